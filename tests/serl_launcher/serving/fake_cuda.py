"""CUDA's state around a capture, as torch 2.11 keeps it, for machines without a card: the current stream, whether it
is capturing, whether that capture is spoilt, and which pools the allocator believes to be recorded to.

`install(monkeypatch)` puts it in place of torch.cuda's functions; torch's own Python around them stays. Tensors are the
CPU's, so that a captured pass has run once and a replay is only counted.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch


class FakeStream:
    """A name; order between streams is no matter on a CPU."""

    def __init__(self, device=None):
        self.device, self.waits = device, 0

    def wait_stream(self, other):
        assert isinstance(other, FakeStream)

    def synchronize(self):
        self.waits += 1


class FakeStreamContext:
    """torch.cuda.stream: the stream before is current again at its exit, and not where it is never left."""

    def __init__(self, cuda, stream):
        self._cuda, self._stream = cuda, stream

    def __enter__(self):
        self._before, self._cuda.current = self._cuda.current, self._stream

    def __exit__(self, *error):
        self._cuda.current = self._before


class FakeCuda:
    def __init__(self):
        self.default = self.current = FakeStream()
        self.capturing = None  # the graph that records
        self.spoilt = False
        self.underway = []  # pools that the allocator believes to be recorded to
        self.uses = Counter()  # of pools, by graphs
        self.replays, self._pools = 0, itertools.count(1)

    def read_back(self):
        """What `.item()` does: refused while capturing, and the capture is lost."""
        if self.capturing is not None:
            self.spoilt = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore words")

    def stream(self, stream):
        return FakeStreamContext(self, stream)

    def synchronize(self, device=None):
        self.read_back()

    def empty_cache(self):
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def end_allocate(self, device, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device, pool):
        self.uses[pool] -= 1

    def graph(self, keep_graph=False):
        return FakeGraph(self)

    def install(self, monkeypatch):
        cuda = {"Stream": FakeStream, "CUDAGraph": self.graph, "current_stream": lambda device=None: self.current}
        cuda |= {"graph_pool_handle": lambda: (0, next(self._pools)), "current_device": lambda: 0}
        cuda |= {name: getattr(self, name) for name in ("stream", "synchronize", "empty_cache")}
        for name, stands_in in cuda.items():
            monkeypatch.setattr(torch.cuda, name, stands_in)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        below = {"_cuda_endAllocateToPool": self.end_allocate, "_cuda_releasePool": self.release}
        for name, stands_in in (below | {"_host_emptyCache": lambda: None}).items():
            monkeypatch.setattr(torch._C, name, stands_in)
        return self


class FakeGraph:
    """torch.cuda.CUDAGraph: the end of a spoilt capture raises before the allocator is told."""

    def __init__(self, cuda):
        self._cuda, self._pool, self._ended = cuda, None, False

    def capture_begin(self, pool=None, capture_error_mode="global"):
        cuda = self._cuda
        assert cuda.current is not cuda.default, "CUDA graphs must be captured on a non-default stream"
        self._pool = pool or (next(cuda._pools), 0)
        cuda.underway.append(self._pool)
        cuda.uses[self._pool] += 1
        cuda.capturing, cuda.spoilt = self, False

    def capture_end(self):
        cuda = self._cuda
        if cuda.capturing is not self:
            raise RuntimeError("CUDA error: operation not permitted")
        cuda.capturing = None
        if cuda.spoilt:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        cuda.underway.remove(self._pool)
        self._ended = True

    def pool(self):
        return self._pool

    def replay(self):
        assert self._ended
        self._cuda.replays += 1

    def __del__(self):
        if self._ended:
            self._cuda.uses[self._pool] -= 1
