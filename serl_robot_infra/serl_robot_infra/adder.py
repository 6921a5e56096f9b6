"""Turns control ticks into step batches. Fed by the actor loop; batches leave through `send`, one body each.

    begin(info) ─▶ add(step) × n ─▶ … ─▶ end(last observation, outcome)
                       └─ full ─▶ sender (a thread): stacked, sent

A full batch leaves only when the next tick arrives, so that the final batch always holds the tick that ended the
episode and can be marked truncated. Observations are copied once, when a batch is stacked.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from serl_transport.contract.schema import EpisodeInfo, Observation, Outcome, StepBatch, TimeStep


class Hands(Protocol):
    """Who does what an adder has to send: `sender.Sender`, or `AtOnce`."""

    def submit(self, job: Callable[[], None]) -> None:
        """Do `job` behind those before it, now or later; raises what an earlier one raised."""
        ...

    def drain(self) -> None:
        """Return once all are done; raises what one of them raised."""
        ...


class AtOnce:
    """In the caller's thread."""

    def submit(self, job: Callable[[], None]) -> None:
        """Do it."""
        job()

    def drain(self) -> None:
        """Nothing waits."""


class Adder:
    """Writes one episode at a time.

    send: takes the body of one `StepBatch` and makes it durable; may block. sender: whose thread calls it.
    """

    def __init__(self, send: Callable[[dict[str, Any]], object], batch_ticks: int = 10, sender: Hands | None = None):
        if batch_ticks < 1:
            raise ValueError(f"batch_ticks: expected at least 1, got {batch_ticks}")
        self._send, self._sender = send, sender or AtOnce()
        self._batch_ticks = batch_ticks
        self._info: EpisodeInfo | None = None
        self._open = False
        self._steps: list[TimeStep] = []
        self._first_tick = 0

    @property
    def info(self) -> EpisodeInfo:
        """Of the episode begun last."""
        assert self._info is not None, "no episode was begun"
        return self._info

    def begin(self, info: EpisodeInfo) -> None:
        """Start an episode; the one before must have ended."""
        assert not self._open, "the episode before was not ended"
        self._info, self._open, self._first_tick = info, True, 0

    def add(self, step: TimeStep) -> None:
        """Add one tick; sends the batch before it when that is full."""
        assert self._open, "add before begin"
        if len(self._steps) == self._batch_ticks:
            self._leave()
            self._first_tick += len(self._steps)
            self._steps = []
        self._steps.append(step)

    def end(self, last_observation: Observation, outcome: Outcome) -> bool:
        """Send the final batch and wait until all are sent; False when the episode has no tick and so never existed."""
        assert self._open, "end before begin"
        self._open = False
        if not self._steps:
            return False
        if outcome.truncated_by is not None:
            self._steps[-1] = replace(self._steps[-1], done=False, truncated=True)
        self._leave(last_observation, outcome)
        self._steps = []
        self._sender.drain()
        return True

    def rescue(self) -> None:
        """Send what is held of the running episode, from another thread: the loop's hangs and this process ends.

        The learner ends the episode there, as that of any actor that vanished.
        """
        if self._open and self._steps:
            self._leave()
            self._sender.drain()

    def abandon(self) -> None:
        """End an episode that has no tick: there is nothing to send."""
        assert not self._steps, "an episode with ticks must be ended"
        self._open = False

    def _leave(self, last_observation: Observation | None = None, outcome: Outcome | None = None) -> None:
        info, first, steps = self.info, self._first_tick, self._steps

        def send() -> None:
            self._send(StepBatch.from_steps(info, first, steps, last_observation, outcome).to_body())

        self._sender.submit(send)
