"""Pictures of a step batch that nobody has unpacked yet. Made by `wire.codec.unpack`, unpacked by `wire.pictures`."""

from dataclasses import dataclass, field
from math import prod

import numpy as np


@dataclass(frozen=True, slots=True)
class Packed:
    """Stands where an array uint8[m, h, w, 3] will be: whoever only checks or passes on a batch need not unpack it."""

    kind: str  # how it was packed, see `wire.pictures`
    shape: tuple[int, ...]  # m, h, w, 3
    data: memoryview = field(repr=False)  # the packed bytes

    @property
    def dtype(self) -> np.dtype:
        """uint8"""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Of the array, not of the packed bytes."""
        return prod(self.shape)
