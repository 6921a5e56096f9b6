"""CUDA graphs of a policy's forward pass, one a bucket: a batch is answered by one launch instead of thousands.

Owned by the policy engine. A bucket is a batch size (1, 2, 4 … max_batch) with the shapes of its inputs; a batch is
filled up to the next size by its last row, copied into the bucket's input buffers, replayed, and cut. Weights are read
where they lie: the engine copies new ones into the same memory, so a graph stays valid over every swap.

    rows ─▶ pad to the bucket ─▶ copy into static inputs ─▶ replay ─▶ clone of the static output, cut to the rows

What was captured at the start stays (`keep`); what comes later, prompts of other lengths, is bounded: the bucket that
was used longest ago goes. A capture that fails ends capturing for good, in one line of the log: CUDA's state is put
right, the graphs that are there go on, everything else runs without one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("policy")
Tensors = dict[str, Tensor]
Forward = Callable[[Tensors], Tensor]
WARMUP = 3  # runs before a capture: lazy initialisation, autotuning and compilation must be over
MAX_BUCKETS = 32  # graphs beside those that are kept; each holds its buffers
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


class CaptureError(RuntimeError):
    """A pass that runs could not be captured."""


@dataclass(frozen=True, slots=True)
class CudaPool:
    """What the captures of a runner share: memory, and the stream that they are recorded on."""

    handle: Any  # of the private memory pool
    stream: torch.cuda.Stream

    @classmethod
    def make(cls) -> CudaPool:
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream())


def capture_cuda(
    forward: Forward, inputs: Tensors, pool: CudaPool | None
) -> tuple[Tensor, Callable[[], None], CudaPool]:
    """Record `forward(inputs)` in a CUDA graph: its output buffer, what runs it again, and the pool for the next one.

    Raises CaptureError where it runs and cannot be captured; what it raises when it is run, as it is.
    """
    pool = pool or CudaPool.make()
    serving = torch.cuda.current_stream()
    pool.stream.wait_stream(serving)
    # torch.cuda.graph leaves its stream the current one where the end of a capture raises; this does not.
    with torch.cuda.stream(pool.stream):
        for _ in range(WARMUP):
            forward(inputs)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph, problem = torch.cuda.CUDAGraph(), None
        try:
            output = _record(graph, forward, inputs, pool.handle)
        except Exception as error:  # forgotten at the end of this block, and with it the tensors of its frames
            log.debug("where a capture failed", exc_info=True)
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if problem is not None:
            torch.cuda.empty_cache()
            raise CaptureError(problem)
    serving.wait_stream(pool.stream)
    return output, graph.replay, pool


def _record(graph: Any, forward: Forward, inputs: Tensors, handle: Any) -> Tensor:
    try:
        # The loader thread may allocate meanwhile: only this thread's calls are held to the rules of a capture.
        graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        output = forward(inputs)
        graph.capture_end()
    except Exception:
        _abandon(graph, handle)
        raise
    return output


_ABANDONED: list[Any] = []  # torch's allocators may still ask these graphs whether they are capturing


def _abandon(graph: Any, handle: Any) -> None:
    """End a capture that failed, as CUDA and torch's allocator need it. Raises where the device itself has failed.

    Where CUDA refuses to end it, torch (2.11) leaves the allocator as if it went on: memory that another stream used
    is never given back then, and the next `empty_cache` or shortage of memory ends in an assertion.
    """
    try:
        graph.capture_end()  # in order where `forward` alone failed
    except RuntimeError:
        _ABANDONED.append(graph)
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # the allocator had been told, what failed came after
            torch._C._cuda_endAllocateToPool(device, handle)
            torch._C._cuda_releasePool(device, handle)
    torch.cuda.synchronize()


class GraphRunner:
    """Calls `forward` through graphs. One thread.

    forward: the device's part of a batch's answer, free of host transfers; capture: `capture_cuda`, or what stands for
    it where there is no CUDA (tests).
    """

    def __init__(self, forward: Forward, capture: Callable = capture_cuda) -> None:
        self._forward, self._capture = forward, capture
        self._buckets: dict[tuple, Bucket] = {}  # the one used last stands last, but for those that are kept
        self._kept: set[tuple] = set()
        self._ended = False  # nothing is captured any more
        self._pool: Any = None
        self.captured = self.plain = 0  # buckets; batches without a graph

    def __call__(self, inputs: Tensors) -> Tensor:
        """`forward(inputs)`; the result is the caller's own."""
        bucket = self._bucket(_key(inputs), inputs)
        if bucket is None:
            self.plain += 1
            return self._forward(inputs)
        for name, static in bucket.inputs.items():
            if name not in _HOST:
                static.copy_(inputs[name])
        bucket.replay()
        return bucket.output.clone()  # the buffer is written again by the next batch

    def keep(self) -> None:
        """Never let go of the buckets that are there."""
        self._kept.update(self._buckets)

    def _bucket(self, key: tuple, inputs: Tensors) -> Bucket | None:
        if key in self._kept:
            return self._buckets[key]
        bucket = self._buckets.pop(key, None) or self._make(key, inputs)
        if bucket is not None:
            self._buckets[key] = bucket
        return bucket

    def _make(self, key: tuple, inputs: Tensors) -> Bucket | None:
        if self._ended:
            return None
        guests = [other for other in self._buckets if other not in self._kept]
        if len(guests) >= MAX_BUCKETS:
            del self._buckets[guests[0]]
        static = {name: x if name in _HOST else x.clone() for name, x in inputs.items()}
        try:
            output, replay, self._pool = self._capture(self._forward, static, self._pool)
        except CaptureError as error:
            self._ended = True
            log.warning(
                "serving.cuda_graphs: a batch of %d cannot be captured: %s; nothing more is, %d graphs that are there "
                "are used on",
                *(key[0], error, len(self._buckets)),
            )
            return None
        self.captured += 1
        return Bucket(static, output, replay)


def _key(inputs: Tensors) -> tuple:
    """Batch size, then name, shape and dtype of every input; values of what stays on the host."""
    parts = [
        (name, tuple(x.shape), x.dtype, tuple(x.flatten().tolist()) if name in _HOST else None)
        for name, x in sorted(inputs.items())
    ]
    return (len(inputs["noise"]), *parts)
