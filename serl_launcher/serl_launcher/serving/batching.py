"""Which questions are answered together, and when. Pure bookkeeping of the policy server: no socket, no clock.

offer ─▶ [ bounded; actors before evaluation, then by arrival ] ─▶ take: up to max_batch
                 └─ expire: past their deadline               fire: full | slack is out | nobody else will come
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

FORGET_S = 10.0  # an actor that was not answered for so long is gone


@dataclass(slots=True)
class Waiting:
    """One admitted question."""

    request: Any  # what the answer is addressed to
    query: Any  # what the engine takes
    actor: str  # who asks
    arrived: float  # monotonic seconds, at the gateway
    deadline: float = math.inf  # monotonic seconds; later it is refused, not executed
    evaluation: bool = False  # gives way to actors that learn
    rank: float = field(init=False, default=0.0)  # smaller is served first


@dataclass(slots=True)
class _Habit:
    """When an actor will ask again: it asks one question at a time, and takes its time between two."""

    answered: float  # monotonic seconds of its last answer
    think_s: float = math.inf  # smoothed time from an answer to the next question; infinite while not known

    def asked(self, now: float) -> None:
        think = max(0.0, now - self.answered)
        self.think_s = think if math.isinf(self.think_s) else 0.5 * self.think_s + 0.5 * think


class BatchQueue:
    """The questions that wait.

    A batch waits for company only while an actor that is missing is about to ask, as its habit says: a lone actor, or
    actors whose ticks are out of step, never wait for nothing.

    Args:
        max_batch: the bucket; as many are answered together at most.
        max_wait_s: how long the first may wait for company at most.
        bound: more are refused.
        evaluation_patience_s: an evaluation's question ranks as if it had come this much later, so that actors go
            first and nobody starves.
    """

    def __init__(self, max_batch: int, max_wait_s: float, bound: int, evaluation_patience_s: float):
        for name, value, low in (("max_batch", max_batch, 1), ("max_wait_ms", max_wait_s, 0), ("max_queue", bound, 1)):
            if value < low:
                raise ValueError(f"serving.{name}: expected at least {low}, got {value}")
        self._max_batch, self._max_wait_s = max_batch, max_wait_s
        self._bound, self._patience = bound, evaluation_patience_s
        self._waiting: list[Waiting] = []
        self._habits: dict[str, _Habit] = {}
        self.service_s = 0.0  # smoothed duration of a batch

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, item: Waiting) -> Waiting | None:
        """Queue it; returns the question to refuse when there are too many: the one that would be served last."""
        item.rank = item.arrived + (self._patience if item.evaluation else 0.0)
        if (habit := self._habits.get(item.actor)) is not None:
            habit.asked(item.arrived)
        self._waiting.append(item)
        if len(self._waiting) <= self._bound:
            return None
        last = max(self._waiting, key=lambda waiting: waiting.rank)
        self._waiting.remove(last)
        return last

    def expire(self, now: float) -> list[Waiting]:
        """Remove and return what is past its deadline."""
        late = [item for item in self._waiting if now > item.deadline]
        if late:
            self._waiting = [item for item in self._waiting if now <= item.deadline]
        return late

    def wait_s(self, now: float) -> float | None:
        """How long the batch may still grow; 0: fire now; None: nothing waits."""
        if not self._waiting:
            return None
        limit = min(item.arrived for item in self._waiting) + self._max_wait_s
        if len(self._waiting) >= self._max_batch or not self._expects_company(now, limit):
            return 0.0
        slack = min(item.deadline for item in self._waiting) - self.service_s
        return max(0.0, min(limit, slack) - now)

    def take(self) -> list[Waiting]:
        """The next batch, in the order of service."""
        self._waiting.sort(key=lambda item: item.rank)
        batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
        return batch

    def served(self, batch: Iterable[Waiting], seconds: float, now: float) -> None:
        """A batch took `seconds` and was answered at `now`."""
        self.service_s = seconds if not self.service_s else 0.8 * self.service_s + 0.2 * seconds
        for item in batch:
            habit = self._habits.setdefault(item.actor, _Habit(now))
            habit.answered = now
        for actor in [actor for actor, habit in self._habits.items() if now - habit.answered > FORGET_S]:
            del self._habits[actor]

    def _expects_company(self, now: float, limit: float) -> bool:
        """Whether an actor that is missing here will ask until `limit`, and is not overdue by far."""
        here = {item.actor for item in self._waiting}
        for actor, habit in self._habits.items():
            due = habit.answered + habit.think_s
            if actor not in here and due <= limit and now <= due + habit.think_s + self._max_wait_s:
                return True
        return False
