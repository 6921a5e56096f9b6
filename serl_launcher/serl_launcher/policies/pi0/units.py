"""What a checkpoint's numbers mean: its processors' statistics as affine maps, checked against the task.

pi0.build calls `units_of`: weights and units belong together. `units_of_dataset` serves a base that is taken to a new
robot, which `policy.statistics` asks for by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serl_launcher.policies.checkpoint import (
    POSTPROCESSOR,
    PREPROCESSOR,
    Checkpoint,
    CheckpointError,
    Statistics,
    mode_of,
    read_statistics,
)
from serl_launcher.policies.normalise import Affine, Units, where_relative
from serl_launcher.policies.pi0.checkpoint import anchors_of
from serl_launcher.policies.relative import check_measured, wanted_anchors
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
        affine(checkpoint.folder, "observation.state", state, len(spec.state_names)),
        affine(checkpoint.folder, "action", back, len(spec.action_names)),
        anchors_of(checkpoint, spec),
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    """A NaN equals a NaN: it is named as such later."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def units_of_dataset(checkpoint: Checkpoint, spec: TaskSpec, dataset: str, relative: Mapping[str, Any] | None) -> Units:
    """Units of a LeRobot dataset's statistics, in the checkpoint's mode, for weights that go on to a new robot.

    relative: `policy.relative`, which of the actions are relative, and their ranges. Raises ValueError.
    """
    if relative is None and anchors_of(checkpoint, spec) is not None:
        raise CheckpointError(
            f"policy.statistics={dataset}: {checkpoint.folder} has relative actions; name them with policy.relative"
        )
    check_measured(relative)
    path = Path(dataset).expanduser() / "meta" / "stats.json"
    if not path.is_file():
        raise CheckpointError(f"policy.statistics={dataset}: no LeRobot dataset with statistics (meta/stats.json)")
    stats = json.loads(path.read_text())
    maps = []
    for feature, kind, dims in (
        ("observation.state", "STATE", len(spec.state_names)),
        ("action", "ACTION", len(spec.action_names)),
    ):
        values = {k: torch.tensor(v, dtype=torch.float32) for k, v in stats.get(feature, {}).items() if k != "count"}
        maps.append(affine(path, feature, Statistics(mode_of(checkpoint, PREPROCESSOR, kind), values), dims))
    if relative is None:
        return Units(*maps)
    anchors = wanted_anchors(spec, relative)
    return Units(maps[0], where_relative(maps[1], anchors, relative), anchors)


def affine(place: object, feature: str, statistics: Statistics, dims: int) -> Affine:
    """One feature's map to the model's units. place: where the statistics are, for a person."""
    where = f"{place}: statistics of {feature!r}"
    if statistics.mode == "IDENTITY":
        return Affine([0.0] * dims, [1.0] * dims)
    wanted = ("mean", "std") if statistics.mode == "MEAN_STD" else BOUNDS.get(statistics.mode)
    if wanted is None:
        raise CheckpointError(f"{where}: unknown mode {statistics.mode!r}")
    missing = [name for name in wanted if name not in statistics.values]
    if missing:
        got = sorted(statistics.values)
        raise CheckpointError(f"{where}: {statistics.mode} needs {' and '.join(wanted)}, there are {got}")
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
