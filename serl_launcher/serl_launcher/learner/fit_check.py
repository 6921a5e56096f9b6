"""Do a dataset's values fit the units that the policy's weights were trained in? Asked before the first step.

    rows of state and action ─▶ ranges_of ─▶ misfits(units) ─▶ a line a dim

examples/train_sft.py and tools/preflight.py ask. A policy's units are its checkpoint's, so that a dim which stood
still there, or was in degrees where the data are in radians, trains on absurd numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch

from serl_launcher.datasets.dataset import Rows
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


def ranges_of(rows: Rows) -> Ranges:
    """Of every row of a dataset."""
    return Ranges(*((x.min(0).astype(np.float64), x.max(0).astype(np.float64)) for x in (rows.state, rows.action)))


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
