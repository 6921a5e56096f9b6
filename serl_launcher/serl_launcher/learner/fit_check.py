"""Do a dataset's values fit the units that the policy's weights were trained in? Asked before the first step.

    rows of state and action ─▶ ranges_of ─▶ misfits(units) ─▶ a line a dim
                             ─▶ mistaken(units): absolute statistics for relative actions, or the reverse

examples/train_sft.py and tools/preflight.py ask. A policy's units are its checkpoint's, so that a dim which stood
still there, or was in degrees where the data are in radians, trains on absurd numbers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from serl_launcher.datasets.dataset import Rows
from serl_launcher.learner.relative import Bounds, longest, ranges_by, relative_ticks
from serl_launcher.learner.symptoms import Finding, Recording
from serl_launcher.policies.normalise import Affine, Units
from serl_launcher.policies.relative import Anchors, own_states
from serl_transport.contract.specs import TaskSpec

FARTHEST = 30.0  # of a value in the model's units: 1 is usual where ranges are mapped, 3 to 10 where deviations are
NARROWEST = 0.02  # of the widest action range in the model's units
STILL = 1e-6  # range of a dim that does not move
FAR, NEAR = 0.9, 0.3  # of `_distance`: certainly not the data's statistics; the data's
FEW_CHUNKS = 4_000  # that are looked at


@dataclass(frozen=True, slots=True)
class Ranges:
    """Lowest and highest value of each dim of state and action, float64[dims] each."""

    state: tuple[np.ndarray, np.ndarray]
    action: tuple[np.ndarray, np.ndarray]


def ranges_of(rows: Rows, units: Units, horizon: int) -> Ranges:
    """Of every row of a dataset; of relative actions, of every chunk of `horizon` ticks that lies in one episode."""
    state, action = ((x.min(0).astype(np.float64), x.max(0).astype(np.float64)) for x in (rows.state, rows.action))
    if units.anchors is not None:
        horizon = min(horizon, longest(rows.bounds))
        action = ranges_by("ticks", rows.state, rows.action, rows.bounds, units.anchors, horizon, units.poses)
    return Ranges(state, action)


def unfit(units: Units, rows: Rows, spec: TaskSpec, horizon: int) -> list[str]:
    """Everything that keeps weights of these units from these data, a line each. horizon: ticks of a chunk."""
    found = mistaken(units, rows, rows.bounds, spec, horizon)
    return [str(found)] if found else misfits(units, ranges_of(rows, units, horizon), spec)


def misfits(units: Units, ranges: Ranges, spec: TaskSpec) -> list[str]:
    """Why these units do not fit the data, a line a dim; empty when they do."""
    found = []
    quantities = (("state", units.state, ranges.state, spec.state_names),)
    quantities += (("action", units.action, ranges.action, spec.action_names),)
    for what, affine, (low, high), names in quantities:
        ends = _in_model_units(affine, low, high)
        low, high = np.atleast_2d(low).min(0), np.atleast_2d(high).max(0)
        found += [
            line
            for k, name in enumerate(names)
            if (line := _misfit(what, name, k, affine, low[k], high[k], ends[:, k]))
        ]
        width = np.ptp(ends, axis=0)
        moves = (high - low) > STILL
        if what == "action" and moves.any() and width[moves].max() < NARROWEST:
            most = width[moves].max()
            found.append(
                f"units of action: the dim that moves most spans {most:.2g} in the checkpoint's units, where about 2 "
                "is usual: degrees in the checkpoint, radians in the data?"
            )
    return found


def mistaken(units: Units, rows: Rows | Recording, bounds: Bounds, spec: TaskSpec, horizon: int) -> Finding | None:
    """Are the statistics those of absolute actions where the policy's are relative, or the reverse? A finding where
    they are just the data's of the other kind, and far from those of their own."""
    own = own_states(spec) or {k: k for k in range(min(spec.action_dim, spec.state_dim))}
    anchors = units.anchors or tuple(own.get(k) for k in range(spec.action_dim))
    dims, horizon = [k for k, anchor in enumerate(anchors) if anchor is not None], min(horizon, longest(bounds))
    kinds = ((anchors, units.poses), (None, ()))
    relative, absolute = (_distance(units.action, rows, bounds, *kind, horizon, dims) for kind in kinds)
    mine, other = (absolute, relative) if units.anchors is None else (relative, absolute)
    if not (mine > FAR and other < NEAR):
        return None
    said, found = ("absolute", "relative") if units.anchors is None else ("relative", "absolute")
    return Finding(
        "statistics of action",
        f"the policy's actions are {said}, its statistics those of {found} ones of these data (off by {other:.2g}; of "
        f"{said} ones by {mine:.2g})",
        "the statistics (LeRobot computes them anew), or use_relative_actions of config and processors",
    )


def _distance(
    affine: Affine,
    rows: Any,
    bounds: Bounds,
    anchors: Anchors | None,
    poses: tuple[int, ...],
    horizon: int,
    dims: list[int],
) -> float:
    """How far offset and scale are from what LeRobot would compute, by the kind that is nearest: the median over dims
    of |offset difference| in units of the data's and |log of the scales' ratio|."""
    ticks = relative_ticks(rows.state, rows.action, bounds, anchors, horizon, FEW_CHUNKS, poses)
    values = np.concatenate(list(ticks))[:, dims]
    dims_moving = np.ptp(values, axis=0) > STILL
    if not dims_moving.any():
        return 0.0
    values = values[:, dims_moving].astype(np.float64)
    offset = np.atleast_2d(affine.offset.cpu().numpy()).mean(0)[dims][dims_moving]
    scale = affine.unit.cpu().numpy()[dims][dims_moving]
    kinds = [(values.mean(0), values.std(0))]
    for ends in ((0.01, 0.99), (0.1, 0.9), (0, 1)):
        low, high = np.quantile(values, ends, axis=0)
        kinds.append(((low + high) / 2, np.maximum((high - low) / 2, STILL)))
    return min(float(np.median(np.abs(offset - mid) / half + np.abs(np.log(scale / half)))) for mid, half in kinds)


def _in_model_units(affine: Affine, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float64[2, dims]: both ends, over the ticks of a chunk where there are such."""
    ends = affine.to_model(torch.tensor(np.stack([low, high]))).cpu().numpy()
    return ends if ends.ndim == 2 else np.stack([ends[0].min(0), ends[1].max(0)])


def _misfit(what: str, name: str, dim: int, affine: Affine, low: float, high: float, ends: np.ndarray) -> str | None:
    data = f"units of {what} dim {dim} ({name}): the data go from {low:.4g} to {high:.4g}"
    scale, offset = float(affine.scale[..., dim].min()), float(affine.offset[..., dim].mean())
    far, stood_still = np.abs(ends).max() > FARTHEST, not STILL < scale < 1 / STILL**2
    if stood_still and (far or high - low > STILL):
        return (
            f"{data}, and in the checkpoint's statistics this dim never moved (offset {offset:.4g}, scale {scale:.2g})"
        )
    if far:
        return (
            f"{data}, which is {ends.min():.4g} to {ends.max():.4g} in the checkpoint's units (offset {offset:.4g}, "
            f"scale {scale:.4g}; at most {FARTHEST:g} is expected)"
        )
    return None
