#!/usr/bin/env python
"""What would the policy have done? Its actions against the recorded ones, over episodes of a LeRobot dataset.

    python tools/eval_open_loop.py runs/<name> [--dataset DIR] [--version best] [--episodes 0 3 -1] [--stride 4]

    python tools/eval_open_loop.py <checkpoint's folder> --dataset DIR [policy.cameras={front: top} ...]

The first argument is a run's folder (also of train_sft.py), its params/ or one of its files or checkpoints, or a
checkpoint's folder in LeRobot's or NVIDIA's layout, for the task that the dataset describes.

Every `stride` ticks the policy sees the recorded observation and predicts a chunk, compared for `stride` ticks. Writes
open_loop.json, errors.png and one trajectory picture an episode, and prints a table with two baselines: hold still, and
repeat the last action. A policy that does not beat both has learnt nothing that matters here.
"""

from __future__ import annotations

import needs_learner  # noqa: F401

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sources import config_of, run_of

from serl_config.mistakes import is_config_mistake, mistake_message
from serl_launcher.datasets.dataset import Dataset, Rows
from serl_launcher.policies.open_loop import (
    METHODS,
    OpenLoop,
    errors_by_tick_of_chunk,
    figures,
    hold_still,
    run_episode,
)
from serl_launcher.run.parameters import find_parameters, find_version, version_of
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import Query
from serl_transport.contract.bounds import printable

COLOURS = {"policy": "tab:blue", "hold_still": "tab:gray", "repeat_last": "tab:orange"}
SHOWN = 8  # trajectory pictures at most


def predictor(engine: PolicyEngine, rows: Rows, first: int) -> Callable[[int], np.ndarray]:
    """f(tick) -> the policy's chunk from the recorded observation, float32[ah, ad], the same noise at every run."""

    def predict(tick: int) -> np.ndarray:
        row = first + tick
        images = {camera: picture[0] for camera, picture in rows.images([row]).items()}
        return engine.act([Query(images, rows.state[row], rows.prompt(row), seed=tick)])[0]

    return predict


def engine_of(source: Path, words: list[str], version: str | None, dataset: str) -> tuple[PolicyEngine, DictConfig]:
    """The policy that `source` names, with its parameters or not at all, and its config.

    Raises ValueError or FileNotFoundError in the user's words.
    """
    needed = ("task.spec", "policy", "algo", "rollout.execute_horizon")
    cfg = config_of(source, words, *needed, builds=("policy", "algo"))
    if dataset == str(RunPaths(run_of(source) or source).dataset) and not Path(dataset).is_dir():
        raise FileNotFoundError(f"{dataset}: no LeRobot dataset; name one with --dataset")
    if (source / "config.json").is_file():
        if version is not None:
            raise ValueError(f"--version={version}: {source} is a checkpoint's folder, which is one version")
        OmegaConf.set_struct(cfg, False)
        cfg.task = {"name": "dataset", "spec": Dataset(dataset).spec().to_dict(), "noop_dims": None}
        return PolicyEngine(cfg, source), cfg
    path = find_version(source, version) if version or source.absolute() == run_of(source) else find_parameters(source)
    engine = PolicyEngine(cfg, path.parent)
    engine.stage_file(path, version_of(path))
    engine.swap()
    return engine, cfg


def evaluate(
    engine: PolicyEngine, cfg: DictConfig, source: str, episodes: list[int] | None, stride: int, output: Path
) -> dict[str, Any]:
    """Run all episodes, write the files, return the figures."""
    spec = engine.spec
    rows = Dataset(source).rows(spec)
    total = len(rows.episodes)
    chosen = range(total) if episodes is None else [e + total if e < 0 else e for e in episodes]
    outside = [e for e in chosen if not 0 <= e < total]
    if outside:
        raise ValueError(f"--episodes: the dataset has {total}, there is no episode {outside[0]}")
    if not 1 <= stride <= engine.policy.action_horizon:
        raise ValueError(f"--stride: expected 1 to {engine.policy.action_horizon} (the chunk), got {stride}")
    for note in rows.notes:
        print(f"note: {note}")
    still = hold_still(rows.action_names, rows.state_names, cfg.task.get("noop_dims"), spec.target_dims)
    done = []
    for episode in chosen:
        first, end = rows.bounds[episode]
        recorded, states = rows.action[first:end], rows.state[first:end]
        done.append(run_episode(episode, recorded, states, predictor(engine, rows, first), still, stride))
    scale = engine.policy.action_units.unit.cpu().numpy()
    out = {"dataset": source, "policy_version": max(0, engine.version), "stride": stride}
    out |= figures(done, spec.action_names, scale)
    output.mkdir(parents=True, exist_ok=True)
    (output / "open_loop.json").write_text(json.dumps(out, indent=2))
    draw_errors(done, spec.action_names, scale, stride, output / "errors.png")
    for episode in done[:SHOWN]:
        draw_trajectory(episode, spec.action_names, output / f"episode_{episode.episode:04d}.png")
    return out


def draw_trajectory(episode: OpenLoop, names: Sequence[str], path: Path) -> None:
    """Recorded and predicted actions over time, one row a joint; dots where a chunk began."""
    size = (10, 1.7 * len(names))
    figure, axes = plt.subplots(len(names), 1, figsize=size, sharex=True, squeeze=False, layout="tight")
    for k, (name, axis) in enumerate(zip(names, axes[:, 0], strict=True)):
        predicted = episode.predicted["policy"][:, k]
        axis.plot(episode.recorded[:, k], color="black", linewidth=1.5, label="recorded")
        axis.plot(predicted, color=COLOURS["policy"], linewidth=1.2, label="policy")
        axis.plot(episode.starts, predicted[episode.starts], ".", color=COLOURS["policy"], label="chunk begins")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(loc="upper right", ncol=3, fontsize=8)
    axes[0, 0].set_title(f"episode {episode.episode}")
    axes[-1, 0].set_xlabel("tick")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_errors(episodes: Sequence[OpenLoop], names: Sequence[str], scale: np.ndarray, stride: int, path: Path) -> None:
    """Three views of the normalised error: per joint, its distribution, and over the ticks of a chunk."""
    figure, (joints, spread, place) = plt.subplots(1, 3, figsize=(15, 4), layout="tight")
    width = 0.8 / len(METHODS)
    bins = np.logspace(-4, 1, 40)
    for k, method in enumerate(METHODS):
        error = np.concatenate([(e.predicted[method] - e.recorded) / scale for e in episodes])
        label, colour = method.replace("_", " "), COLOURS[method]
        joints.bar(np.arange(len(names)) + k * width, np.square(error).mean(0), width, label=label, color=colour)
        magnitude = np.clip(np.abs(error).max(1), bins[0], bins[-1])
        spread.hist(magnitude, bins=bins, histtype="step", linewidth=1.5, label=label, color=colour)
        by_tick = errors_by_tick_of_chunk(episodes, scale, stride)[method]
        place.plot(np.arange(stride), by_tick, "o-", label=label, color=colour)
    joints.set_xticks(np.arange(len(names)) + width, names)
    joints.set_title("mean squared error per joint")
    spread.set_xscale("log")
    spread.set_title("largest error of a tick, ticks per bin")
    place.set_xticks(np.arange(stride))
    place.set_title("mean squared error by tick of the chunk")
    for axis in (joints, spread, place):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle("errors in the model's units")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def text(out: dict) -> str:
    """The table that is printed."""
    which = f"policy version {out['policy_version']}" if out["policy_version"] else "the parameters of that folder"
    lines = [f"{out['episodes']} episodes, {out['ticks']} ticks, {which}"]
    lines.append(f"{'':<14}{'mse (model)':>13}{'mse (phys.)':>13}{'max (model)':>13}{'smoothness':>13}")
    for method in METHODS:
        row = out[method]
        values = (row["mse_normalised"], row["mse_physical"], row["max_error_normalised"], row["smoothness"])
        lines.append(f"{method.replace('_', ' '):<14}" + "".join(f"{v:>13.4g}" for v in values))
    lines.append(f"{'recorded':<14}{'':>39}{out['recorded_smoothness']:>13.4g}")
    verdict = "beats both baselines" if out["better_than_best_baseline"] else "does NOT beat both baselines"
    share = out["share_of_best_baseline"]  # None: a baseline makes no error
    told = "" if share is None else f" (share of the better one: {share:.2f})"
    return "\n".join([*lines, f"the policy {verdict}{told}"])


def main(argv: list[str] | None = None) -> int:
    """Exit 0, or 2 on a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder, something in one, or a checkpoint's folder")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides, for a checkpoint's folder")
    parser.add_argument("--dataset", help="LeRobot dataset, a folder or owner/name on the hub; default: the run's own")
    parser.add_argument("--version", help="best (of a fine-tuning run), or a file in params/; default: the newest")
    parser.add_argument("--episodes", type=int, nargs="+", help="indices, negative ones from the end; default: all")
    parser.add_argument(
        "--stride", type=int, help="ticks of a chunk that are compared; default: rollout.execute_horizon"
    )
    parser.add_argument("--output", type=Path, help="folder of the results; default: <run>/open_loop")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        home = run_of(args.source) or args.source
        dataset = args.dataset or str(RunPaths(home).dataset)
        engine, cfg = engine_of(args.source, args.words, args.version, dataset)
        stride = args.stride or min(cfg.rollout.execute_horizon, engine.policy.action_horizon)
        output = args.output or home / "open_loop"
        out = {"run": str(args.source)} | evaluate(engine, cfg, dataset, args.episodes, stride, output)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as mistake:
        if isinstance(mistake, InstantiationException) and not is_config_mistake(mistake):
            raise
        told = mistake_message(mistake) if isinstance(mistake, InstantiationException) else str(mistake)
        print(f"eval_open_loop: {printable(told)}", file=sys.stderr)
        return 2
    print(text(out))
    print(f"written: {output}/open_loop.json, errors.png and {min(SHOWN, out['episodes'])} trajectories")
    return 0


if __name__ == "__main__":
    sys.exit(main())
