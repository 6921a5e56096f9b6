"""Asks for the next chunk while the running one is executed, so that no tick waits for the policy.

Used by the control loop in place of `ActionChunkBroker` (`rollout.realtime: async | rtc`).

    control loop ─▶ infer(obs), one action a tick            worker thread: policy.infer(obs) ─▶ [one answer]
                      │ from index s of the running chunk, s + d ≤ execute_horizon: ask ─▶ ▲          │
                      └ answered: go on in the new chunk at the index of the present tick ◀───────────┘

With rtc the question carries the rest of the running chunk (`prefix_actions`, from this tick on) and the delay d in
ticks that is expected (the longest of the last ones), so that the policy guides the new chunk to agree with what is
executed meanwhile (Black et al. 2025, arXiv 2506.07339). With async it does not, and two chunks may disagree.
"""

import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpi_client.base_policy import BasePolicy

MODES = ("async", "rtc")
_DELAYS = 10


@dataclass(frozen=True, slots=True)
class _Question:
    """What the worker is busy with."""

    generation: int  # of the plan that it belongs to; an older one is void
    tick: int  # at which its observation was taken: index 0 of its answer
    obs: dict[str, Any]
    ahead: bool  # asked while another chunk was executed


@dataclass(frozen=True, slots=True)
class _Chunk:
    """An answer in execution."""

    answer: dict[str, Any]  # as the policy gave it; `actions` float32[ah, ad]
    tick: int  # of its index 0


class RealtimeChunkBroker(BasePolicy):
    """One action a tick out of overlapping chunks.

    Args:
        policy: answers `infer` with `actions` float32[ah, ad]; called in a thread of its own, one call at a time.
        execute_horizon: ticks between two chunks, when the policy is fast enough for that.
        mode: async or rtc.
        miss_limit: consecutive chunks that may be missed before the running one is no longer trusted and the robot
            holds. A chunk is missed when the policy fails, and each time another max(execute_horizon, d) ticks pass
            without its answer.
    """

    def __init__(self, policy: BasePolicy, execute_horizon: int, mode: str, miss_limit: int = 2):
        if mode not in MODES:
            raise ValueError(f"rollout.realtime: expected off, {' or '.join(MODES)}, got {mode!r}")
        if execute_horizon < 1:
            raise ValueError(f"execute_horizon: expected at least 1, got {execute_horizon}")
        if miss_limit < 1:
            raise ValueError(f"watchdog.hold_after_chunks: expected at least 1, got {miss_limit}")
        self._policy, self._horizon = policy, execute_horizon
        self._guided, self._miss_limit = mode == "rtc", miss_limit
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[_Question, dict[str, Any] | Exception]] = queue.SimpleQueue()
        self._asked: _Question | None = None
        self._chunk: _Chunk | None = None
        self._planned: _Chunk | None = None  # whose actions were given as `plan`
        self._tick = self._generation = self._failures = 0
        self._delays: deque[int] = deque(maxlen=_DELAYS)
        self._problem: Exception | None = None
        self.idle_ticks = 0  # ticks that waited for the policy, the first of a plan aside
        self._worker = threading.Thread(target=self._work, name="chunk-prefetch", daemon=True)
        self._worker.start()

    @property
    def delay(self) -> int:
        """d: the longest of the last delays between an observation and its chunk's first action, ticks."""
        return max(self._delays, default=0)

    @property
    def missed_chunks(self) -> int:
        """Consecutive chunks that did not come in time."""
        overdue = self._tick - self._asked.tick if self._asked and self._chunk else 0
        return self._failures + overdue // max(self._horizon, self.delay + 1)

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """The entries of the chunk in execution, with `actions` float32[ad] of this tick; with a new chunk `plan`, its
        actions float32[n, ad] from this tick on.

        Waits for the policy only when there is no action to give; then it raises what the policy raised. Call it again
        for the same tick after an error.
        """
        self._collect()
        if self._asked is None and self._wants_chunk():
            self._ask(obs)
        idle = self._index() is None or self.missed_chunks >= self._miss_limit
        if idle and self._chunk is not None:
            self.idle_ticks += 1
            self._chunk = None  # too old to go on with
        while self._index() is None:
            self._raise_problem()
            if self._asked is None:
                self._ask(obs)
            self._take(self._answers.get())
        return self._next_action()

    def drop_chunk(self) -> None:
        """Forget the rest of the chunk and the question under way: someone else drove meanwhile."""
        self._chunk = self._problem = None
        self._generation += 1
        self._failures = 0

    def reset(self) -> None:
        """A new episode began: forget the chunk, and tell the policy."""
        self.drop_chunk()
        self._policy.reset()

    def close(self) -> None:
        """End the worker; it finishes the question that it is busy with."""
        self._questions.put(None)

    def _wants_chunk(self) -> bool:
        """Whether a question of now would be answered when the running chunk has given its share, or later.

        While the delay is unknown it is asked at once.
        """
        if self._chunk is None or not self._delays:
            return True
        return self._tick - self._chunk.tick >= self._horizon - self.delay

    def _index(self) -> int | None:
        """Where in the running chunk the present tick is; None when it has no action for it."""
        if self._chunk is None:
            return None
        index = self._tick - self._chunk.tick
        return index if index < len(self._chunk.answer["actions"]) else None

    def _ask(self, obs: dict[str, Any]) -> None:
        index = self._index()
        if self._guided and self._chunk is not None and index is not None:
            rest = np.ascontiguousarray(self._chunk.answer["actions"][index:], np.float32)
            obs = {**obs, "prefix_actions": rest, "inference_delay": min(self.delay, len(rest))}
        self._problem = None  # of an earlier question: this one may do better
        self._asked = _Question(self._generation, self._tick, obs, self._chunk is not None)
        self._questions.put(self._asked)

    def _collect(self) -> None:
        while not self._answers.empty():
            self._take(self._answers.get())

    def _take(self, item: tuple[_Question, dict[str, Any] | Exception]) -> None:
        question, answer = item
        self._asked = None
        if question.generation != self._generation:
            return
        if isinstance(answer, Exception):
            self._problem, self._failures = answer, self._failures + 1
            return
        delay = self._tick - question.tick
        if question.ahead:
            self._delays.append(delay)
        self._problem, self._failures = None, 0
        length = len(answer["actions"])
        if length < self._horizon:
            raise ValueError(f"execute_horizon={self._horizon} is longer than the chunk, {length} actions")
        if delay < length:
            self._chunk = _Chunk(answer, question.tick)

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _next_action(self) -> dict[str, Any]:
        assert self._chunk is not None
        rest = self._chunk.answer["actions"][self._tick - self._chunk.tick :]
        self._tick += 1
        plan = {"plan": rest} if self._chunk is not self._planned else {}
        self._planned = self._chunk
        return {**self._chunk.answer, "actions": rest[0], **plan}

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            try:
                answer: dict[str, Any] | Exception = self._policy.infer(question.obs)
                answer = {**answer, "actions": np.array(answer["actions"])}  # it may write the next one to the same
            except Exception as error:  # raised again where the action is missed
                answer = error
            self._answers.put((question, answer))
