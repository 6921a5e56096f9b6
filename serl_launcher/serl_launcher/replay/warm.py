"""Memory for batches that is used again: what is copied into it takes no page faults. `RingReader.gather` asks for it.

    array ──▶ rows are copied in ──▶ batch ──▶ step ──▶ last reference gone ──▶ the block waits for the next array

A fresh array of a batch of pictures costs two to three times its copy: the kernel finds and clears its pages, and takes
them back afterwards. A block here returns when nothing looks at it any more, views and tensors of it included.
"""

from collections import defaultdict
from math import prod

import numpy as np

SMALLEST = 1 << 16  # bytes; smaller arrays come from the allocator, which keeps them anyway
MOST_IDLE = 24  # blocks of one size that wait; beyond it memory goes back


class _Lease:
    """Holds a block as long as anything exports its bytes."""

    def __init__(self, block: np.ndarray, idle: list[np.ndarray]) -> None:
        self._block, self._idle = block, idle

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._block)

    def __del__(self) -> None:
        if len(self._idle) < MOST_IDLE:
            self._idle.append(self._block)


class WarmMemory:
    """Blocks that have been arrays before, by size. Used by one thread at a time; arrays may die in any."""

    def __init__(self) -> None:
        self._idle: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """As np.empty: an array of its own, whatever was in it."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < SMALLEST:
            return np.empty(shape, dtype)
        idle = self._idle[nbytes]
        block = idle.pop() if idle else np.empty(nbytes, np.uint8)
        return np.frombuffer(_Lease(block, idle), dtype).reshape(shape)
