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
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from sources import config_of, run_of

from serl_launcher.datasets import dataset
from serl_launcher.datasets.folder import read_info, read_parquet
from serl_launcher.learner import settings_check as settings
from serl_launcher.learner.relative import measure
from serl_launcher.learner.symptoms import Meaning, Recording, symptoms
from serl_launcher.run.config import plain, task_spec
from serl_launcher.run.files import read_json
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.bounds import printable

MODES, TIME = {"demo": 0, "online": 1, "eval": 2}, "complementary_info.time_ns"
LOOKS, EPISODES = 3, 30  # pictures of an episode; episodes that are looked at


def read_rows(rows: dataset.Rows, data: dataset.Dataset) -> tuple[Recording, np.ndarray | None]:
    """A dataset's rows as the checks take them, and each one's mode (0 demo, 1 online, 2 eval) where a run wrote it."""
    lengths = [len(episode) for episode in rows.episodes]
    chosen = np.unique(np.linspace(0, len(lengths) - 1, min(len(lengths), EPISODES)).round().astype(int))
    looks: dict[str, list[np.ndarray]] = {camera: [] for camera in rows.cameras}
    for first, end in [rows.bounds[e] for e in chosen] if looks else []:
        for camera, seen in rows.images(np.linspace(first, end - 1, LOOKS).astype(int).tolist()).items():
            looks[camera].append(seen)
    said = [MODES.get(episode.said.get("mode"), -1) for episode in rows.episodes]
    mode = None if -1 in said else np.repeat(said, lengths)
    time_ns = None
    if TIME in read_info(data.folder)["features"]:
        files = sorted({episode.file for episode in rows.episodes})
        time_ns = np.concatenate([read_parquet(file, [TIME])[TIME].to_numpy() for file in files])
    pictures = {camera: np.array(seen) for camera, seen in looks.items()}
    episode = np.repeat(np.arange(len(lengths)), lengths)
    return Recording(rows.state, rows.action, episode, data.fps, pictures, time_ns), mode


def look(cfg: DictConfig, folder: Path, status: dict[str, Any]) -> list[str]:
    """Everything that is found, one line each; `note: …` is no finding. Raises ValueError or OSError in the user's
    words."""
    spec, data = task_spec(cfg), dataset.Dataset(folder)
    fit = data.fit(spec)
    if fit.problems:
        return [*fit.problems, *(f"note: {note}" for note in fit.notes)]
    whole = data.rows(spec)
    rows, mode = read_rows(whole, data)
    meaning = Meaning.of(spec, plain(cfg, "task.noop_dims"))
    stats, horizon = read_json(settings.stats_file(folder)) or {}, settings.chunk_of(cfg)
    taught = rows if mode is None or not (mode == settings.DEMONSTRATION).any() else rows.part(mode == 0)
    found = [note for note in fit.notes if note.startswith("prompt:")]  # what a policy was never told
    more = symptoms(taught, spec, meaning, (plain(cfg, "task.safety") or {}).get("max_speed"))
    measure(cfg, whole, spec, horizon)
    own = settings.units_of_policy(cfg, spec)
    for key, parts, values in (
        ("observation.state", data.columns.state, data.table.state), ("action", data.columns.action, data.table.action),
    ):  # fmt: skip
        if key == "action" and own.anchors is not None:
            continue  # LeRobot keeps those of relative actions there; the policy's own are looked at below
        if len(parts) == 1:  # else several columns make it up, each with statistics of its own
            more += settings.statistics(stats, key, values)
    more += settings.units(rows, spec, own, bool(cfg.policy.get("checkpoint")), horizon)
    more += settings.cameras_mapped(cfg.policy.get("cameras"), spec)
    more += settings.chunks(cfg, horizon, rows, spec)
    more += settings.latency(cfg, horizon, status.get("serving") or {}, spec)
    more += settings.origin(cfg)
    more += settings.motion(rows, mode, np.array(sorted(meaning.rates), int))
    notes = [f"note: {note}" for note in fit.notes if note not in found]
    return [*found, *map(str, more), *notes]


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
    wrong = [line for line in found if not line.startswith("note: ")]
    for number, line in enumerate(wrong, 1):
        print(f"{number}. {printable(line)}")
    for line in found[len(wrong) :]:
        print(printable(line))
    if not wrong:
        print("nothing found: data, statistics, units, chunks and timing fit together")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
