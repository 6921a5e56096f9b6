"""Copies on the host of what is to be written, so that training goes on while it is written. By publisher and resume.

    between two steps: state on the device ─ of ─▶ host memory, kept from one copy to the next ─▶ learner.disk's thread

On a GPU the copies are queued on a stream of their own into pinned memory, beside the next forward and backward pass:
`Learner.step` lets its optimizer wait for them there (`hold_changes`), and the thread waits before it reads. On a CPU
it is a copy in memory. The state is held once more: where that is more than half of the memory that is free, there is
no copy (NoRoomError), and the write holds training up as it must.
"""

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor

SHARE_OF_FREE = 0.5  # of the host's available memory that new copies may take


class NoRoomError(Exception):
    """The host lacks the memory for a copy; the message says how much it would take."""


class Copies:
    """Host copies of one tree of tensors at a time: one that is asked for overwrites the one before."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self.taken: torch.cuda.Event | None = None  # of the newest copy, where it comes from a GPU

    def of(self, tree: Any) -> Any:
        """The same dicts and lists with every tensor copied; what else is in them is taken as it is.

        The tensors may be changed when `taken` has passed on the device, or at once where it is None. NoRoomError.
        """
        wanted = dict(_leaves(tree, ()))
        new = {key: x for key, x in wanted.items() if not _fits(self._kept.get(key), x)}
        self._check_room(sum(x.nbytes for x in new.values()))
        on_card = next((x.device for x in wanted.values() if x.is_cuda), None)
        for key, x in new.items():
            self._kept[key] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if on_card is None:
            self._copy(wanted)
            self.taken = None
        else:
            self._stream = self._stream or torch.cuda.Stream(on_card)
            self._stream.wait_stream(torch.cuda.current_stream(on_card))
            with torch.cuda.stream(self._stream):
                self._copy(wanted)
                self.taken = self._stream.record_event()
        return _rebuilt(tree, (), self._kept)

    def hold_changes(self) -> None:
        """What the device is given from now on begins when the newest copy is whole; the host waits for nothing."""
        if self.taken is not None:
            torch.cuda.current_stream(self.taken.device).wait_event(self.taken)

    def wait(self) -> None:
        """Until the newest copy is whole; called by who reads it."""
        if self.taken is not None:
            self.taken.synchronize()

    @torch.no_grad()
    def _copy(self, wanted: dict[tuple[Any, ...], Tensor]) -> None:
        for key, x in wanted.items():
            self._kept[key].copy_(x.detach(), non_blocking=True)

    @staticmethod
    def _check_room(nbytes: int) -> None:
        free = psutil.virtual_memory().available
        if nbytes > SHARE_OF_FREE * free:
            raise NoRoomError(f"a copy of {nbytes / 1e9:.1f} GB, of {free / 1e9:.1f} GB that are free")


def _fits(kept: Tensor | None, x: Tensor) -> bool:
    return kept is not None and (kept.shape, kept.dtype) == (x.shape, x.dtype)


def _leaves(tree: Any, at: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield at, tree
    elif isinstance(tree, dict | list):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(item, (*at, key))


def _rebuilt(tree: Any, at: tuple[Any, ...], copies: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return copies[at]
    if isinstance(tree, dict):
        return {key: _rebuilt(item, (*at, key), copies) for key, item in tree.items()}
    return [_rebuilt(item, (*at, k), copies) for k, item in enumerate(tree)] if isinstance(tree, list) else tree
