"""Why a policy that looks right does not move the robot: what config, statistics, units and status say, one check each.

tools/why.py calls these beside `learner.symptoms`, which looks at the rows alone. Each yields `Finding`s; nothing is
built and no weight is read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from serl_launcher.learner.fit_check import mistaken
from serl_launcher.learner.relative import FEW, Bounds, episodes_of, longest, relative_ticks
from serl_launcher.learner.symptoms import Finding, Recording
from serl_launcher.policies.checkpoint import Checkpoint
from serl_launcher.policies.groot.build import release_of
from serl_launcher.policies.groot.head import NEW_EMBODIMENT
from serl_launcher.policies.groot_n1_5 import checkpoint as n1_5
from serl_launcher.policies.normalise import Affine, Units, as_trained
from serl_launcher.policies.pi0.units import units_of, units_of_dataset
from serl_launcher.policies.relative import check_measured
from serl_launcher.run.config import plain, task_spec
from serl_launcher.run.origin import config_of_run
from serl_transport.contract.specs import TaskSpec

EVALUATION, DEMONSTRATION = 2, 0  # complementary_info.mode


def units_of_policy(cfg: DictConfig, spec: TaskSpec) -> Units:
    """The policy's own units, without building it. Raises ValueError in the user's words."""
    policy = cfg.policy
    if not policy.get("checkpoint"):
        check_measured(policy.get("relative"))
        return as_trained(spec, policy.get("trained_on"), policy.get("relative"))[1]
    found = Checkpoint.find(policy.checkpoint)
    if "groot" in policy._target_:
        tag, mapping = policy.get("embodiment_tag") or NEW_EMBODIMENT, dict(policy.get("cameras") or {})
        read = release_of(policy._target_).read_assets
        return read(found, tag, spec, mapping, policy.get("statistics"), policy.get("relative")).units
    if policy.get("statistics"):
        return units_of_dataset(found, spec, policy.statistics, policy.get("relative"))
    return units_of(found, spec)


def chunk_of(cfg: DictConfig) -> int | None:
    """Ticks of a chunk, as the config or the checkpoint says."""
    if cfg.policy.get("action_horizon"):
        return int(cfg.policy.action_horizon)
    if not cfg.policy.get("checkpoint"):
        return None
    found = Checkpoint.find(cfg.policy.checkpoint)
    config = n1_5.model_config(found)[0] if "groot_n1_5" in cfg.policy._target_ else found.config
    return config.get("chunk_size") or config.get("action_horizon")


def statistics(stats: Mapping[str, Any], key: str, values: np.ndarray) -> Iterator[Finding]:
    """meta/stats.json, which LeRobot's own training and GR00T's new embodiments use, against the rows that it should
    describe: float32[n, d] of column `key`."""
    change = "recompute meta/stats.json with LeRobot after any change of the data"
    told = {name: np.asarray(stats.get(key, {}).get(name, []), np.float64).ravel() for name in ("mean", "std")}
    for name, x in told.items():
        if x.shape != (values.shape[1],) or not np.isfinite(x).all():
            yield Finding("statistics", f"{key}: {name} is absent, of another size or holds NaN", change)
            return
    mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    floor = 1e-4 * (1 + np.abs(mean))
    off = (np.abs(told["mean"] - mean) > 0.1 * std + floor) | (np.abs(told["std"] - std) > 0.1 * std + floor)
    if off.any():
        k = int(off.argmax())
        yield Finding(
            "statistics are not the data's",
            f"{key} dim {k}: meta/stats.json says mean {told['mean'][k]:.4g}, std {told['std'][k]:.4g}, the rows "
            f"{mean[k]:.4g} and {std[k]:.4g} ({off.sum()} dims)",
            change,
        )


def units(
    rows: Recording, spec: TaskSpec, policy: Units, of_checkpoint: bool, horizon: int | None = None
) -> Iterator[Finding]:
    """The data in the policy's units: a few ones wide around 0, or the network sees and says something else. horizon:
    ticks of a chunk, over which relative actions are looked at."""
    bounds = episodes_of(rows.episode)
    if found := mistaken(policy, rows, bounds, spec, horizon or 1):
        yield found
    where = "policy.checkpoint (its statistics)" if of_checkpoint else "task.spec.{0}_low and {0}_high"
    for what, affine, values, names in (
        ("state", policy.state, rows.state, spec.state_names),
        ("action", policy.action, rows.action, spec.action_names),
    ):
        if what == "action" and policy.anchors is not None:
            values, z = _chunks_in(policy, rows, bounds, horizon or 1)
        else:
            z = _in(affine, values)
        low, high = np.percentile(z, (1, 99), axis=0)
        wide, far = high - low, np.maximum(np.abs(low), np.abs(high))
        moves = np.ptp(values, axis=0) > 0
        change = f"{where.format(what)}; or the unit of the recording (degrees, radians, a gripper of 0 to 100)"
        if (far > 6).any():
            k = int(far.argmax())
            yield Finding(
                "normalisation does not fit",
                f"{what} {names[k]!r} reaches {far[k]:.3g} in the policy's units, expected about 1 ({(far > 6).sum()} "
                f"of {len(far)} dims; recorded {values[:, k].min():.4g} to {values[:, k].max():.4g})",
                change,
            )
        elif moves.any() and wide[moves].max() < 0.1:
            yield Finding(
                "normalisation does not fit",
                f"{what}: the widest dim covers {wide.max():.2g} of the policy's units, expected about 2: what is "
                "recorded is next to nothing to it",
                change,
            )


def cameras_mapped(mapping: Mapping[str, str] | None, spec: TaskSpec) -> Iterator[Finding]:
    """policy.cameras that gives a camera the name of another one of the task."""
    for camera, theirs in (mapping or {}).items():
        name = theirs.rpartition(".")[2]
        if name != camera and name in spec.cameras:
            yield Finding(
                "camera order", f"{camera!r} is given to the policy as {theirs!r}", f"policy.cameras.{camera}"
            )


def chunks(cfg: DictConfig, horizon: int | None, rows: Recording, spec: TaskSpec) -> Iterator[Finding]:
    """How chunks are executed, against what they hold."""
    execute = plain(cfg, "rollout.execute_horizon")
    if horizon is None:
        return
    if execute and execute > horizon:
        told = f"{execute} ticks of each chunk are to be executed, it holds {horizon}"
        yield Finding("chunk too short", told, "rollout.execute_horizon")
    _, lengths = np.unique(rows.episode, return_counts=True)
    if np.median(lengths) < horizon:
        told = f"an episode has {np.median(lengths):.0f} ticks (median), a chunk {horizon}: most labels are padding"
        yield Finding("episodes shorter than a chunk", told, "policy.action_horizon, or record longer episodes")
    rate = plain(cfg, "rollout.rate_hz") or plain(cfg, "task.rate_hz")
    if rate and rate < 0.67 * spec.control_hz:
        told = f"the actor runs at {rate:g} Hz, the task was recorded at {spec.control_hz:g}"
        yield Finding("slower than trained", told, "rollout.rate_hz")


def latency(cfg: DictConfig, horizon: int | None, serving: Mapping[str, Any], spec: TaskSpec) -> Iterator[Finding]:
    """How long an answer takes, against the ticks that it is for."""
    slow = serving.get("p99_ms")
    if slow is None or horizon is None:
        return
    rate = plain(cfg, "rollout.rate_hz") or plain(cfg, "task.rate_hz") or spec.control_hz
    ticks, execute = slow / 1e3 * rate, plain(cfg, "rollout.execute_horizon") or horizon
    if ticks >= horizon:
        told = f"an answer takes {slow:.0f} ms (p99) = {ticks:.1f} ticks, a chunk holds {horizon}: it comes too late"
        yield Finding("latency beyond the chunk", told, "serving (GPU, flow_steps, compile), or task.spec.control_hz")
    elif ticks > execute and plain(cfg, "rollout.realtime") in (None, False, "off"):
        told = f"an answer takes {slow:.0f} ms (p99), {execute} ticks take {execute / rate * 1e3:.0f}: stop and go"
        yield Finding("latency beyond the executed ticks", told, "rollout.realtime=async, or rollout.execute_horizon")


def origin(cfg: DictConfig) -> Iterator[Finding]:
    """The task that parameters come from against the task that they are to drive."""
    theirs = config_of_run(cfg.checkpoint_path) if cfg.get("checkpoint_path") else None
    if theirs is None or theirs.get("task") is None:
        return
    mine, was = task_spec(cfg), task_spec(theirs)
    if len(mine.action_names) != len(was.action_names) or len(mine.state_names) != len(was.state_names):
        told = f"{len(was.state_names)} states and {len(was.action_names)} actions there, other numbers here"
        yield Finding("another robot", told, "task=, or checkpoint_path")
    if set(mine.action_names) == set(was.action_names) and mine.action_names != was.action_names:
        yield Finding("order of the dims", f"actions were {list(was.action_names)}", "task.spec.action_names")
    if set(mine.state_names) == set(was.state_names) and mine.state_names != was.state_names:
        yield Finding("order of the dims", f"states were {list(was.state_names)}", "task.spec.state_names")
    if list(mine.cameras) != list(was.cameras) and not cfg.policy.get("checkpoint"):
        told = f"it saw {list(was.cameras)}, here it is given {list(mine.cameras)}, in this order"
        yield Finding("camera order", told, "task.spec.cameras")
    if mine.prompt != was.prompt:
        told = f"trained with {was.prompt!r}, told {mine.prompt!r} here"
        yield Finding("prompt unknown to training", told, "task.spec.prompt")
    if abs(mine.control_hz - was.control_hz) > 0.01 * was.control_hz:
        told = f"trained at {was.control_hz:g} Hz, runs at {mine.control_hz:g}"
        yield Finding("another rate", told, "task.spec.control_hz")


def motion(rows: Recording, mode: np.ndarray | None, moves: np.ndarray) -> Iterator[Finding]:
    """What the policy did in evaluations beside the demonstrations of the same run; moves: dims that are rates."""
    if mode is None or not len(moves):
        return
    demo, alone = (np.abs(rows.action[mode == m][:, moves]) for m in (DEMONSTRATION, EVALUATION))
    if min(len(demo), len(alone)) > 50 and alone.mean() < 0.1 * demo.mean():
        share = alone.mean() / demo.mean()
        yield Finding(
            "the policy hardly moves", f"its actions in evaluations are {share:.0%} of the demonstrations'",
            "whatever else is named here first; else train longer (tools/eval_open_loop.py)",
        )  # fmt: skip


def stats_file(folder: Path) -> Path:
    """Where a LeRobot dataset keeps its statistics."""
    return folder / "meta" / "stats.json"


def _in(affine: Affine, values: np.ndarray) -> np.ndarray:
    return (values - affine.offset.numpy()) / affine.scale.numpy()


def _chunks_in(policy: Units, rows: Recording, bounds: Bounds, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Relative actions of all ticks of chunks, physical and in the policy's units: float32[n, ad] each."""
    horizon = min(horizon, longest(bounds))
    of_ticks = relative_ticks(rows.state, rows.action, bounds, policy.anchors, horizon, FEW, policy.poses)
    ticks = np.stack(list(of_ticks), axis=1)
    z = policy.action.to_model(torch.from_numpy(ticks)).numpy()
    return ticks.reshape(-1, ticks.shape[-1]), z.reshape(-1, ticks.shape[-1])
