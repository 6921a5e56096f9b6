"""Relative actions over a dataset's chunks: their ranges, measured where `policy.relative` of the config asks for them.

    rows ─▶ action[t … t + ah] − state[t], of every t whose chunk lies in one episode ─▶ low, high ─▶ policy.relative

examples/train_sft.py, tools/preflight.py and tools/why.py call `measure` before a policy is built; the config has
the numbers from then on, so that a run's folder knows them. The statistics are LeRobot's: mean and deviation (PI0), 1%
and 99% (PI0.5) over all ticks of all chunks, lowest and highest of each tick (GR00T).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from omegaconf import DictConfig, open_dict

from serl_launcher.datasets.dataset import Rows
from serl_launcher.policies.checkpoint import PREPROCESSOR, Checkpoint, mode_of
from serl_launcher.policies.poses import to_relative
from serl_launcher.policies.relative import Anchors, has_ranges, wanted_anchors
from serl_transport.contract.specs import TaskSpec

Bounds = Sequence[tuple[int, int]]
"""Rows of each episode, first and past the last."""
FEW = 10_000  # chunks that quantiles are taken over; more are thinned evenly
STILL = 1e-6  # range of a dim that does not move


def measure(cfg: DictConfig, rows: Rows, spec: TaskSpec, horizon: int | None) -> bool:
    """Fill `policy.relative` of the config from a dataset, where it has no ranges yet; was there anything to do?

    horizon: ticks of a chunk. Raises ValueError in the user's words.
    """
    relative = cfg.policy.get("relative")
    if relative is None or has_ranges(relative):
        return False
    anchors = wanted_anchors(spec, relative)
    if horizon is None:
        raise ValueError("policy.relative: needs the length of a chunk; set policy.action_horizon")
    ends = ranges_by(_kind(cfg), rows.state, rows.action, rows.bounds, anchors, horizon)
    with open_dict(relative):
        relative.low, relative.high = ([[float(f"{x:.7g}") for x in row] for row in end] for end in ends)
    return True


def _kind(cfg: DictConfig) -> str:
    """What a head of this config normalises by: the checkpoint's mode, else its release's."""
    target = cfg.policy._target_
    if "groot" in target:
        return "ticks"
    if not cfg.policy.get("checkpoint"):
        return "quantiles" if target.endswith("pi05") else "deviation"
    mode = mode_of(Checkpoint.find(cfg.policy.checkpoint), PREPROCESSOR, "ACTION")
    return {"MEAN_STD": "deviation", "MIN_MAX": "range"}.get(mode, "quantiles")


def relative_ticks(
    state: np.ndarray,
    action: np.ndarray,
    bounds: Bounds,
    anchors: Anchors | None,
    horizon: int,
    most: int | None = None,
    poses: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """What whole chunks hold at each tick, relative where `anchors` says so: float32[chunks, ad], `horizon` times.
    poses: first dims of what is relative as a pose.

    state, action: float32[rows, …], physical; most: chunks, thinned evenly. Raises ValueError where no episode is as
    long as a chunk.
    """
    starts = np.concatenate([np.arange(first, max(first, end - horizon + 1)) for first, end in bounds])
    if not len(starts):
        raise ValueError(
            f"relative actions: no episode holds a chunk of {horizon} ticks, the longest has {longest(bounds)}"
        )
    starts = starts[:: -(-len(starts) // most)] if most else starts
    shift = np.zeros((len(starts), action.shape[1]), np.float32)
    for k, anchor in enumerate(anchors or ()):
        if anchor is not None:
            shift[:, k] = state[starts, anchor]
    for tick in range(horizon):
        yield to_relative(torch.from_numpy(action[starts + tick]), torch.from_numpy(shift), poses).numpy()


def ranges_by(
    kind: str,
    state: np.ndarray,
    action: np.ndarray,
    bounds: Bounds,
    anchors: Anchors | None,
    horizon: int,
    poses: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes −1 and 1: float64[ticks or 1, ad] each. kind: ticks, range, quantiles or deviation; a dim that never
    moves is given ±1 by the last two."""
    if kind == "quantiles":
        values = np.concatenate(list(relative_ticks(state, action, bounds, anchors, horizon, FEW, poses)))
        low, high = np.quantile(values, (0.01, 0.99), axis=0)
    else:
        ticks = [_moments(x) for x in relative_ticks(state, action, bounds, anchors, horizon, poses=poses)]
        lowest, highest, mean, square = (np.stack(column) for column in zip(*ticks, strict=True))
        if kind == "ticks":
            return lowest, highest
        if kind == "range":
            return lowest.min(0)[None], highest.max(0)[None]
        std = np.sqrt(np.maximum(square.mean(0) - mean.mean(0) ** 2, 0))
        low, high = mean.mean(0) - std, mean.mean(0) + std
    still = high - low < STILL
    return np.where(still, low - 1, low)[None], np.where(still, high + 1, high)[None]


def _moments(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Lowest, highest, mean and mean square, float64[ad] each."""
    x = x.astype(np.float64)
    return x.min(0), x.max(0), x.mean(0), np.square(x).mean(0)


def longest(bounds: Bounds) -> int:
    """Ticks of the longest episode."""
    return max(end - first for first, end in bounds)


def episodes_of(episode: np.ndarray) -> Bounds:
    """Bounds of an episode index per row, int[rows]."""
    cuts = np.flatnonzero(np.diff(episode)) + 1
    return list(zip([0, *cuts], [*cuts, len(episode)], strict=True))
