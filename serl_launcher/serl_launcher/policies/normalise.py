"""Affine maps between physical units and the model's, kept as buffers so that they travel with the parameters.

Policy heads own one per quantity; `from_bounds` serves a policy that starts at random, dataset statistics serve a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
