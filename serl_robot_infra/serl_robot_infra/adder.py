"""Turns control ticks into step batches. Fed by the actor loop; batches leave through `send`, one body each.

    begin(info) ─▶ add(step) × n ─▶ … ─▶ end(last observation, outcome)

A full batch leaves only when the next tick arrives, so that the final batch always holds the tick that ended the
episode and can be marked truncated. Observations are copied once, when a batch is stacked.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serl_transport.contract.schema import EpisodeInfo, Observation, Outcome, StepBatch, TimeStep


class Adder:
    """Writes one episode at a time. send: takes the body of one `StepBatch` and makes it durable; may block."""

    def __init__(self, send: Callable[[dict[str, Any]], object], batch_ticks: int = 10):
        if batch_ticks < 1:
            raise ValueError(f"batch_ticks: expected at least 1, got {batch_ticks}")
        self._send = send
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
            self._send(StepBatch.from_steps(self.info, self._first_tick, self._steps).to_body())
            self._first_tick += len(self._steps)
            self._steps.clear()
        self._steps.append(step)

    def end(self, last_observation: Observation, outcome: Outcome) -> bool:
        """Send the final batch; False when the episode has no tick and so never existed."""
        assert self._open, "end before begin"
        self._open = False
        if not self._steps:
            return False
        if outcome.truncated_by is not None:
            self._steps[-1] = replace(self._steps[-1], done=False, truncated=True)
        batch = StepBatch.from_steps(self.info, self._first_tick, self._steps, last_observation, outcome)
        self._steps.clear()
        self._send(batch.to_body())
        return True

    def rescue(self) -> None:
        """Send what is held of the running episode, from another thread: the loop's hangs and this process ends.

        The learner ends the episode there, as that of any actor that vanished.
        """
        if self._open and self._steps:
            self._send(StepBatch.from_steps(self.info, self._first_tick, self._steps).to_body())

    def abandon(self) -> None:
        """End an episode that has no tick: there is nothing to send."""
        assert not self._steps, "an episode with ticks must be ended"
        self._open = False
