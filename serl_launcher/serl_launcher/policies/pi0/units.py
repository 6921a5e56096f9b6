"""What a checkpoint's numbers mean: its processors' statistics as affine maps, checked against the task.

pi0.build calls `units_of`. The statistics are the checkpoint's own, never the dataset's or the
task's: weights and units belong together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serl_launcher.policies.checkpoint import (
    POSTPROCESSOR,
    PREPROCESSOR,
    Checkpoint,
    CheckpointError,
    Statistics,
    read_statistics,
)
from serl_launcher.policies.normalise import Affine, Units
from serl_launcher.policies.pi0.checkpoint import anchors_of
from serl_transport.contract.specs import TaskSpec

EPSILON = 1e-8  # as LeRobot's normaliser
BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


def units_of(checkpoint: Checkpoint, spec: TaskSpec) -> Units:
    """State and action units of a checkpoint. Raises CheckpointError when absent, not finite or of another size."""
    state = read_statistics(checkpoint, PREPROCESSOR, "observation.state", "STATE")
    action = read_statistics(checkpoint, PREPROCESSOR, "action", "ACTION")
    back = read_statistics(checkpoint, POSTPROCESSOR, "action", "ACTION")
    same = action.mode == back.mode and all(_equal(back.values[k], v) for k, v in action.values.items())
    if not same:
        raise CheckpointError(
            f"{checkpoint.folder}: {PREPROCESSOR} and {POSTPROCESSOR} disagree on the statistics of 'action'"
        )
    return Units(
        affine(checkpoint, "observation.state", state, len(spec.state_names)),
        affine(checkpoint, "action", back, len(spec.action_names)),
        anchors_of(checkpoint, spec),
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    """A NaN equals a NaN: it is named as such later."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def affine(checkpoint: Checkpoint, feature: str, statistics: Statistics, dims: int) -> Affine:
    """One feature's map to the model's units."""
    where = f"{checkpoint.folder}: statistics of {feature!r}"
    if statistics.mode == "IDENTITY":
        return Affine([0.0] * dims, [1.0] * dims)
    wanted = ("mean", "std") if statistics.mode == "MEAN_STD" else BOUNDS.get(statistics.mode)
    if wanted is None:
        raise CheckpointError(f"{where}: unknown mode {statistics.mode!r}")
    missing = [name for name in wanted if name not in statistics.values]
    if missing:
        got = sorted(statistics.values)
        raise CheckpointError(f"{where}: {statistics.mode} needs {' and '.join(wanted)}, the checkpoint has {got}")
    first, second = (_checked(where, name, statistics.values[name], dims) for name in wanted)
    width = second if statistics.mode == "MEAN_STD" else second - first
    if (width < 0).any():
        what = "std is negative" if statistics.mode == "MEAN_STD" else f"{wanted[1]} is below {wanted[0]}"
        raise CheckpointError(f"{where}: {what} in dims {torch.nonzero(width < 0).flatten().tolist()}")
    if statistics.mode == "MEAN_STD":
        return Affine(first.tolist(), (second + EPSILON).tolist())
    width = torch.where(width == 0, torch.full_like(width, EPSILON), width)
    return Affine((first + width / 2).tolist(), (width / 2).tolist())


def _checked(where: str, name: str, values: Tensor, dims: int) -> Tensor:
    values = values.flatten()
    if len(values) != dims:
        raise CheckpointError(f"{where}: {name} has {len(values)} dims, the task has {dims}")
    if not torch.isfinite(values).all():
        bad = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
        raise CheckpointError(f"{where}: {name} holds NaN or Inf in dims {bad}")
    return values
