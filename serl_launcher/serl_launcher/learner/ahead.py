"""The batch of the next step, made while a step runs: drawn, decoded, prepared and on its way to the device.

    take ─▶ batch k ─▶ step k of the trainer
    begin ─▶ thread: draw k + 1 ─▶ agent.prepare ─▶ pinned memory ─▶ (side stream) ─▶ waits here, one at most

learner.data (online) and learner.fine_tuning own one each. On a GPU what the thread queues runs on a stream of its own,
and the step's stream waits for it there, not the host. On a CPU it is the same without streams and pinned memory.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class Ahead:
    """make: a batch from its arguments; called in one thread at a time, that of `take` or one of its own."""

    def __init__(self, make: Callable[..., Any], device: torch.device) -> None:
        self._make, self._pool = make, ThreadPoolExecutor(1, "batches")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Future[tuple[Any, torch.cuda.Event | None]] | None = None
        self._of: tuple[Any, ...] = ()

    def begin(self, *of: Any) -> None:
        """Start making a batch of these arguments; what else is ahead is forgotten."""
        self.drop()
        self._of, self._next = of, self._pool.submit(self._run, *of)

    def take(self, *of: Any) -> Any:
        """A batch of these arguments: the one that is ahead, or one made now. Raises what `make` raises."""
        if self._of != of:
            self.drop()
        ahead, self._next = self._next, None
        if ahead is None and self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # what it reads may be on its way
        made, copied = self._run(*of) if ahead is None else ahead.result()
        if copied is not None:
            stream = torch.cuda.current_stream(copied.device)
            stream.wait_event(copied)
            for tensor in _tensors(made):
                tensor.record_stream(stream)  # its memory is not given away before the step has read it
        return made

    def wait(self) -> None:
        """Until nothing is being made: what it is made of may be changed then."""
        if self._next is not None:
            wait([self._next])

    def drop(self) -> None:
        """Forget what is ahead: what it was made of has changed."""
        self.wait()
        self._next = None

    def close(self) -> None:
        """No batch is wanted any more."""
        self.drop()
        self._pool.shutdown()

    @torch.no_grad()
    def _run(self, *of: Any) -> tuple[Any, torch.cuda.Event | None]:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            made = self._make(*of)
            return made, None if self._stream is None else self._stream.record_event()


def _tensors(made: Any) -> Iterator[Tensor]:
    """Those on a GPU, in dataclasses, lists, tuples and dicts."""
    if isinstance(made, Tensor):
        if made.is_cuda:
            yield made
    elif is_dataclass(made):
        for field in fields(made):
            yield from _tensors(getattr(made, field.name))
    elif isinstance(made, list | tuple | dict):
        for item in made.values() if isinstance(made, dict) else made:
            yield from _tensors(item)
