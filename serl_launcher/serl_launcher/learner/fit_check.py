"""Do a dataset's values fit the units that the policy's weights were trained in? Asked before the first step.

    rows of state and action ─▶ column_ranges (a NaN: episode and frame) ─┐
    meta/stats.json ─▶ recorded_ranges ───────────────────────────────────┴▶ misfits(units) ─▶ a line a dim

examples/train_sft.py reads the rows; tools/preflight.py has the statistics alone. A policy's units are those of its
checkpoint, so that a dim which stood still there, or was in degrees where the data are in radians, trains on absurd
numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from serl_launcher.learner.sft import Chunks, Columns
from serl_launcher.policies.normalise import Affine, Units
from serl_transport.contract.specs import TaskSpec

FARTHEST = (
    30.0  # of a value in the model's units: some 1 where ranges are mapped, 3 to 10 where standard deviations are
)
NARROWEST = 0.02  # of the widest action range in the model's units
STILL = 1e-6  # range of a dim that does not move


@dataclass(frozen=True, slots=True)
class Ranges:
    """Lowest and highest value of each dim of state and action, float64[dims] each."""

    state: tuple[np.ndarray, np.ndarray]
    action: tuple[np.ndarray, np.ndarray]


def column_ranges(chunks: Chunks) -> Ranges:
    """Of every row. Raises ValueError naming column, dim, episode and frame of the first value that is not finite."""
    rows, columns = chunks.rows.hf_dataset, chunks.columns
    found = []
    for parts in (columns.state, columns.action):
        values = np.concatenate([_column(rows, key)[:, part] for key, part in parts], axis=1)
        found.append((values.min(0), values.max(0)))
    return Ranges(*found)


def _column(rows: Any, key: str) -> np.ndarray:
    """float64[rows, dims] of a column."""
    values = np.asarray(rows.select_columns([key]).with_format("numpy")[:][key], np.float64).reshape(len(rows), -1)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, dim = bad[0].tolist()
        place = rows.select_columns(["episode_index", "frame_index"]).with_format("numpy")[row]
        raise ValueError(
            f"dataset: {key} holds {values[row, dim]} in dim {dim}, first in episode {place['episode_index']}, frame "
            f"{place['frame_index']} ({len(np.unique(bad[:, 0]))} rows in all): mend or remove that episode"
        )
    return values


def recorded_ranges(stats: Mapping[str, Any], columns: Columns) -> Ranges | None:
    """As `meta/stats.json` says; None where it has no ranges of a column."""
    found = []
    for parts in (columns.state, columns.action):
        if any(not {"min", "max"} <= set(stats.get(key) or {}) for key, _ in parts):
            return None
        ends = (np.concatenate([np.atleast_1d(stats[k][e]).ravel()[part] for k, part in parts]) for e in ("min", "max"))
        found.append(tuple(np.asarray(end, np.float64) for end in ends))
    return Ranges(*found)


def misfits(units: Units, ranges: Ranges, spec: TaskSpec) -> list[str]:
    """Why these units do not fit the data, a line a dim; empty when they do."""
    found = []
    quantities = (("state", units.state, ranges.state, spec.state_names),)
    quantities += (("action", units.action, ranges.action, spec.action_names),)
    for what, affine, (low, high), names in quantities:
        ends = _in_model_units(affine, low, high)
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


def _in_model_units(affine: Affine, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float64[2, dims]: both ends."""
    return affine.to_model(torch.tensor(np.stack([low, high]))).cpu().numpy()


def _misfit(what: str, name: str, dim: int, affine: Affine, low: float, high: float, ends: np.ndarray) -> str | None:
    data = f"units of {what} dim {dim} ({name}): the data go from {low:.4g} to {high:.4g}"
    scale, offset = float(affine.scale[dim]), float(affine.offset[dim])
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
