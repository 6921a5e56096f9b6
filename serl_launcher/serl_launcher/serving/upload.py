"""New parameters to a card while it serves: in chunks, through pinned memory, on a stream of their own.

The policy engine's loader thread calls it while `stage_file` reads a published file tensor by tensor.

    file ─▶ one tensor on the host ─▶ [ pinned chunk ] ─▶ its place on the card          swap: those places are read
            (loader thread waits for each chunk; the serving thread's stream waits for none)

A plain copy from pageable memory would queue on the stream that answers run on, once a tensor. What is returned is
complete: whoever swaps it in need not wait for anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes: 3 ms of a PCIe 4 link


class Upload:
    """Copies tensors of the host to `device`, in the dtypes of those that they will replace. One thread.

    On a CPU, where there is nothing to pin and no stream, it runs the same chunks (tests).
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK) -> None:
        self._stream, self._chunk = None, torch.empty(chunk, dtype=torch.uint8)
        if device.type == "cuda":
            self._stream, self._chunk = torch.cuda.Stream(device), self._chunk.pin_memory()

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of every tensor, with the dtype and device of its namesake in `like`, there when this returns.

        tensors: read as they are asked for, one at a time in memory. What reading raises is raised.
        """
        # Made on the thread's own stream, as the policy's: memory that is free there may still be read by what runs.
        placed = {name: torch.empty(p.shape, dtype=p.dtype, device=p.device) for name, p in like.items()}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for name, target in placed.items():
            self._copy(tensors[name].reshape(-1), target.view(-1))
        return placed

    def _copy(self, source: Tensor, target: Tensor) -> None:
        """Flat tensors of one length."""
        buffer = self._chunk[: len(self._chunk) // target.itemsize * target.itemsize].view(target.dtype)
        for begin in range(0, len(target), len(buffer)):
            part = target[begin : begin + len(buffer)]
            pinned = buffer[: len(part)].copy_(source[begin : begin + len(part)])
            if self._stream is None:
                part.copy_(pinned)
                continue
            with torch.cuda.stream(self._stream):
                part.copy_(pinned, non_blocking=True)
            self._stream.synchronize()  # the chunk is written again
