"""CUDA graphs of a policy's forward pass, one a bucket: a batch is answered by one launch instead of thousands.

Owned by the policy engine. A bucket is a batch size (1, 2, 4 … max_batch) with the shapes of its inputs; a batch is
filled up to the next size by its last row, copied into the bucket's input buffers, replayed, and cut. Weights are read
where they lie: the engine copies new ones into the same memory, so a graph stays valid over every swap.

    rows ─▶ pad to the bucket ─▶ copy into static inputs ─▶ replay ─▶ clone of the static output, cut to the rows

A bucket that cannot be captured costs one line in the log; its batches run without a graph from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("policy")
Tensors = dict[str, Tensor]
Forward = Callable[[Tensors], Tensor]
WARMUP = 3  # runs before a capture: lazy initialisation, autotuning and compilation must be over
MAX_BUCKETS = 32  # graphs kept; each holds its buffers
_HOST = ("image_grid_thw",)  # tensors that stay on the host: their values are part of the bucket


def bucket_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two up to `largest`, and `largest` itself."""
    sizes = [1]
    while sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if sizes[-1] == largest else (*sizes, largest)


def bucket_of(rows: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds `rows`, None when none does."""
    return next((size for size in sizes if size >= rows), None)


@dataclass(slots=True)
class Bucket:
    """One captured forward pass."""

    inputs: Tensors  # static buffers, read by `replay`
    output: Tensor  # static buffer, written by `replay`
    replay: Callable[[], None]


def capture_cuda(forward: Forward, inputs: Tensors, pool: Any) -> tuple[Tensor, Callable[[], None], Any]:
    """Record `forward(inputs)` in a CUDA graph: its output buffer, what runs it again, and the memory pool."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            forward(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The loader thread may allocate meanwhile: only this thread's calls are held to the rules of a capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = forward(inputs)
    return output, graph.replay, graph.pool()


class GraphRunner:
    """Calls `forward` through graphs. One thread.

    forward: the device's part of a batch's answer, free of host transfers; capture: `capture_cuda`, or what stands for
    it where there is no CUDA (tests).
    """

    def __init__(self, forward: Forward, capture: Callable = capture_cuda) -> None:
        self._forward, self._capture = forward, capture
        self._buckets: dict[tuple, Bucket] = {}
        self._failed: set[tuple] = set()
        self._pool: Any = None
        self.captured = self.plain = 0  # buckets; batches without a graph

    def __call__(self, inputs: Tensors) -> Tensor:
        """`forward(inputs)`; the result is the caller's own."""
        key = _key(inputs)
        bucket = None if key in self._failed else self._buckets.get(key) or self._make(key, inputs)
        if bucket is None:
            self.plain += 1
            return self._forward(inputs)
        for name, static in bucket.inputs.items():
            if name not in _HOST:
                static.copy_(inputs[name])
        bucket.replay()
        return bucket.output.clone()  # the buffer is written again by the next batch

    def _make(self, key: tuple, inputs: Tensors) -> Bucket | None:
        if len(self._buckets) >= MAX_BUCKETS:
            del self._buckets[next(iter(self._buckets))]  # the oldest
        static = {name: x if name in _HOST else x.clone() for name, x in inputs.items()}
        try:
            output, replay, self._pool = self._capture(self._forward, static, self._pool)
        except Exception as error:
            self._failed.add(key)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("serving.cuda_graphs: a batch of %d runs without a graph: %s", key[0], reason)
            return None
        self.captured += 1
        bucket = self._buckets[key] = Bucket(static, output, replay)
        return bucket


def _key(inputs: Tensors) -> tuple:
    """Batch size, then name, shape and dtype of every input; values of what stays on the host."""
    parts = [
        (name, tuple(x.shape), x.dtype, tuple(x.flatten().tolist()) if name in _HOST else None)
        for name, x in sorted(inputs.items())
    ]
    return (len(inputs["noise"]), *parts)
