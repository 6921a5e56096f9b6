"""Affine maps between physical units and the model's, kept as buffers so that they travel with the parameters.

Policy heads own one per quantity; `from_bounds` serves a policy that starts at random, dataset statistics serve a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serl_transport.contract.specs import TaskSpec


class Affine(nn.Module):
    """x_model = (x_physical − offset) / scale, per dimension."""

    offset: Tensor
    scale: Tensor

    def __init__(self, offset: Sequence[float], scale: Sequence[float]) -> None:
        super().__init__()
        if any(not s > 0 for s in scale):
            raise ValueError(f"normalisation: every scale must be positive, got {list(scale)}")
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    @classmethod
    def from_bounds(cls, low: Sequence[float], high: Sequence[float]) -> Affine:
        """Maps [low, high] onto [−1, 1]."""
        pairs = list(zip(low, high, strict=True))
        return cls([(h + lo) / 2 for lo, h in pairs], [(h - lo) / 2 for lo, h in pairs])

    def to_model(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale

    def to_physical(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


@dataclass(frozen=True, slots=True)
class Units:
    """What a policy's numbers mean: travels with a checkpoint."""

    state: Affine  # s dims
    action: Affine  # robot's action dims

    @classmethod
    def from_spec(cls, spec: TaskSpec) -> Units:
        """The task's ranges onto [−1, 1], for weights that start at random."""
        return cls(
            Affine.from_bounds(spec.state_low, spec.state_high), Affine.from_bounds(spec.action_low, spec.action_high)
        )


def as_trained(spec: TaskSpec, trained_on: Mapping[str, Any] | None) -> tuple[tuple[str, ...], Units]:
    """The task's cameras in the order that random weights know, and the units that they were trained in.

    trained_on: `policy.trained_on` of the config (run.origin writes it), where weights of another task's ranges go on;
    None: the task's own.
    """
    if trained_on is None:
        return tuple(spec.cameras), Units.from_spec(spec)
    low, high = ([list(trained_on[f"{what}_{end}"]) for what in ("state", "action")] for end in ("low", "high"))
    return tuple(trained_on["cameras"]), Units(*map(Affine.from_bounds, low, high))


def pad_last(x: Tensor, size: int) -> Tensor:
    """Zeros behind the last dim up to `size`; the same tensor when it has that size."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))
