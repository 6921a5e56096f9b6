#!/usr/bin/env python
"""Open loop is good, or nothing is known, and the robot does not move: what is wrong, the evidence, and what to change.

    python tools/why.py <run or checkpoint> [dataset] [key=value ...]

A run's folder (also of train_sft.py) brings its config, and its own dataset where none is named; a checkpoint's folder
(LeRobot's or NVIDIA's) is asked about the robot that the overrides name, as for a run: task=so101. Looked at: the
dataset's metadata (as preflight), its rows and some pictures, the policy's own statistics, how chunks are executed,
how long answers took, and the run that checkpoint_path names. Exits 0 when nothing is wrong, 1 with findings, 2 on a
mistake of the user.
"""

from __future__ import annotations

import needs_learner  # noqa: F401

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from sources import config_of, run_of

from serl_launcher.learner import settings_check as settings
from serl_launcher.learner.data_check import findings
from serl_launcher.learner.modality import Modality
from serl_launcher.learner.sft import Columns, check_columns, open_dataset
from serl_launcher.learner.symptoms import Meaning, Rows, symptoms
from serl_launcher.run.config import plain, task_spec
from serl_launcher.run.files import read_json
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.bounds import printable
from serl_transport.contract.specs import TaskSpec

LOOKS, EPISODES = 3, 30  # pictures of an episode; episodes that are looked at


def read_rows(folder: Path, columns: Columns, spec: TaskSpec) -> tuple[Rows, np.ndarray | None]:
    """The rows of a LeRobot dataset, and each one's complementary_info.mode where it is a run's."""
    dataset = open_dataset(folder)
    check_columns(dataset.meta.features, columns, spec)
    keys = {key for key, _ in (*columns.state, *columns.action)} | {"episode_index"}
    extra = [k for k in ("complementary_info.time_ns", "complementary_info.mode") if k in dataset.meta.features]
    table = dataset.hf_dataset.select_columns([*keys, *extra]).with_format("numpy")[:]

    def joined(parts: list[tuple[str, slice]]) -> np.ndarray:
        return np.concatenate([np.stack(table[key])[:, part] for key, part in parts], 1).astype(np.float32)

    episode = np.asarray(table["episode_index"])
    pictures = _looks(dataset, columns.images, episode)
    time_ns, mode = (np.asarray(table[k]).ravel() if k in table else None for k in
                     ("complementary_info.time_ns", "complementary_info.mode"))  # fmt: skip
    return Rows(
        joined(columns.state), joined(columns.action), episode, float(dataset.meta.fps), pictures, time_ns
    ), mode


def _looks(dataset: Any, keys: Mapping[str, str], episode: np.ndarray) -> dict[str, np.ndarray]:
    """camera -> uint8[episodes, LOOKS, h, w, 3]: first, middle and last picture of some episodes."""
    chosen = np.unique(episode)
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), EPISODES)).round().astype(int))]
    ticks = [np.flatnonzero(episode == e)[np.linspace(0, (episode == e).sum() - 1, LOOKS).astype(int)] for e in chosen]
    rows = [[dataset[int(at)] for at in some] for some in ticks] if keys else []
    return {camera: np.array([[_picture(row[key]) for row in some] for some in rows]) for camera, key in keys.items()}


def _picture(image: Any) -> np.ndarray:
    return (image.permute(1, 2, 0) * 255).round().byte().numpy()


def look(cfg: DictConfig, folder: Path, status: dict[str, Any]) -> list[str]:
    """Everything that is found, one line each. Raises ValueError or OSError in the user's words."""
    spec, modality = task_spec(cfg), Modality.read(folder)
    columns = modality.columns if modality else Columns.plain(spec)
    found = findings(folder, spec, columns, "MEAN_STD")
    try:
        rows, mode = read_rows(folder, columns, spec)
    except ValueError as mistake:  # the columns are others, which the findings say as well
        return found or [str(mistake)]
    safety = plain(cfg, "task.safety") or {}
    meaning = Meaning.of(spec, plain(cfg, "task.noop_dims"))
    stats, horizon = read_json(settings.stats_file(folder)) or {}, settings.chunk_of(cfg)
    taught = rows if mode is None or not (mode == settings.DEMONSTRATION).any() else rows.part(mode == 0)
    more = symptoms(taught, spec, meaning, safety.get("max_speed"))
    if not modality:
        more += settings.statistics(rows, stats, "observation.state", rows.state, spec.state_names)
        more += settings.statistics(rows, stats, "action", rows.action, spec.action_names)
    policy = settings.units_of_policy(cfg, spec)
    more += settings.units(rows, spec, policy, bool(cfg.policy.get("checkpoint")))
    more += settings.cameras_mapped(cfg.policy.get("cameras"), spec)
    more += settings.chunks(cfg, horizon, rows, spec)
    more += settings.latency(cfg, horizon, status.get("serving") or {}, spec)
    more += settings.origin(cfg)
    more += settings.motion(rows, mode, np.array(sorted(meaning.rates), int))
    return found + [str(one) for one in more]


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run's folder, or a checkpoint's")
    parser.add_argument(
        "rest", nargs="*", metavar="dataset | key=value", help="LeRobot dataset; default: the run's own"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    words = [word for word in args.rest if "=" in word]
    folders = [Path(word) for word in args.rest if "=" not in word]
    try:
        cfg = config_of(args.source, words, "task.spec", "policy")
        paths = RunPaths(run_of(args.source) or args.source)
        folder = folders[0] if folders else paths.dataset
        if not (folder / "meta" / "info.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no LeRobot dataset (meta/info.json); name the one that it was trained on"
            )
        found = look(cfg, folder, read_json(paths.status) or {})
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as mistake:
        print(f"why: {printable(str(mistake))}", file=sys.stderr)
        return 2
    for number, line in enumerate(found, 1):
        print(f"{number}. {printable(line)}")
    if not found:
        print("nothing found: data, statistics, units, chunks and timing fit together")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
