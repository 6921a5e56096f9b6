"""Affine maps between physical units and the model's, kept as buffers so that they travel with the parameters.

Policy heads own one per quantity; `from_bounds` serves a policy that starts at random, dataset statistics serve a
checkpoint. Everything outside a policy is absolute and physical: where a model's actions are relative to the state that
its chunk was asked at (policies.relative), this is where they become so and cease to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.relative import Anchors, wanted_anchors
from serl_transport.contract.specs import TaskSpec


class Affine(nn.Module):
    """x_model = (x_physical − offset) / scale, per dimension, or per tick of a chunk and dimension.

    offset, scale: [dims], or [ticks, dims], whose last row serves later ticks too. A scale of infinity: the dim never
    moved, it is 0 to the model and `offset` to the robot.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, offset: Sequence[Any], scale: Sequence[Any]) -> None:
        super().__init__()
        if not (np.asarray(scale) > 0).all():  # of the values: the tensors may be shapes alone
            raise ValueError(f"normalisation: every scale must be positive, got {list(scale)}")
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    @classmethod
    def from_bounds(cls, low: Sequence[float], high: Sequence[float]) -> Affine:
        """Maps [low, high] onto [−1, 1]."""
        pairs = list(zip(low, high, strict=True))
        return cls([(h + lo) / 2 for lo, h in pairs], [(h - lo) / 2 for lo, h in pairs])

    @property
    def unit(self) -> Tensor:
        """Physical size of one of the model's units, float32[dims], over the ticks of a chunk where they differ."""
        if self.scale.ndim == 1:
            return self.scale
        moved = ~self.scale.isinf()
        mean = torch.where(moved, self.scale, 0).sum(0) / moved.sum(0)
        return torch.where(moved.any(0), mean, torch.inf)

    def to_model(self, x: Tensor) -> Tensor:
        return (x - self._of(x, self.offset)) / self._of(x, self.scale)

    def to_physical(self, x: Tensor) -> Tensor:
        offset, scale = self._of(x, self.offset), self._of(x, self.scale)
        return torch.where(scale.isinf(), offset, x * scale + offset)

    def _of(self, x: Tensor, rows: Tensor) -> Tensor:
        """The rows of x's ticks: x is float[..., ticks, dims] where they differ by tick."""
        if rows.ndim == 1:
            return rows
        return rows[torch.arange(x.shape[-2], device=rows.device).clamp(max=len(rows) - 1)]


@dataclass(frozen=True, slots=True)
class Units:
    """What a policy's numbers mean: travels with a checkpoint."""

    state: Affine  # s dims
    action: Affine  # robot's action dims, after they became relative to what `anchors` names
    anchors: Anchors | None = None  # ad places in the state, None where a dim is absolute; None: all are
    poses: tuple[int, ...] = ()  # first dims of actions that are relative as a pose (policies.poses)

    @classmethod
    def from_spec(cls, spec: TaskSpec) -> Units:
        """The task's ranges onto [−1, 1], for weights that start at random."""
        return cls(
            Affine.from_bounds(spec.state_low, spec.state_high), Affine.from_bounds(spec.action_low, spec.action_high)
        )


def as_trained(
    spec: TaskSpec, trained_on: Mapping[str, Any] | None, relative: Mapping[str, Any] | None = None
) -> tuple[tuple[str, ...], Units]:
    """The task's cameras in the order that random weights know, and the units that they were trained in.

    trained_on: `policy.trained_on` of the config (run.origin writes it), where weights of another task's ranges go on;
    None: the task's own. relative: `policy.relative`, whose low and high are the ranges of what is relative.
    """
    if trained_on is None:
        order, units = tuple(spec.cameras), Units.from_spec(spec)
    else:
        low, high = ([list(trained_on[f"{what}_{end}"]) for what in ("state", "action")] for end in ("low", "high"))
        order, units = tuple(trained_on["cameras"]), Units(*map(Affine.from_bounds, low, high))
    if relative is None:
        return order, units
    anchors = wanted_anchors(spec, relative)
    return order, Units(units.state, where_relative(units.action, anchors, relative), anchors)


def where_relative(action: Affine, anchors: Anchors, relative: Mapping[str, Any]) -> Affine:
    """`action`, but for the dims that are relative: there low and high of `policy.relative` are −1 and 1."""
    low, high = (torch.tensor([list(row) for row in relative[end]]) for end in ("low", "high"))
    which = torch.tensor([anchor is not None for anchor in anchors])
    offset, scale = (low + high) / 2, (high - low) / 2
    scale = torch.where(scale > 0, scale, torch.inf)
    return Affine(
        torch.where(which, offset, action.offset).squeeze(0).tolist(),
        torch.where(which, scale, action.scale).squeeze(0).tolist(),
    )


def pad_last(x: Tensor, size: int) -> Tensor:
    """Zeros behind the last dim up to `size`; the same tensor when it has that size."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))
