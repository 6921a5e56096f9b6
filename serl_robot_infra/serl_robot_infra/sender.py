"""Sends step batches from a thread of its own, so that the control loop waits for no disk. Made by `wiring`.

    control loop ── submit(job) ─▶ [at most HELD jobs, in order] ─▶ thread: stack, pack, spool ─▶ outbox
        ▲                                  │
        └── waits, and people are told ◀───┘  HELD jobs wait for a slow disk, or the spool is full
        └── raises what a job raised; the job stays the next one

A job is one step batch. What is held here a kill -9 takes with it, as it takes the ticks of a batch that is not full:
next to nothing while the disk keeps up, never more than HELD batches beside the one that is being written.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import StopSignal
from serl_transport.contract.errors import SpoolFull

log = logging.getLogger(__name__)

HELD = 8
_AGAIN_S = 0.5  # between two tries of a full spool, and two lines about a wait
Job = Callable[[], None]


class Sender:
    """Owns the thread. observer: told of waits; stop: a job that meets a full spool then fails and is not retried."""

    def __init__(self, observer: Observer, stop: StopSignal, held: int = HELD):
        self._observer, self._stop, self._held = observer, stop, held
        self._jobs: deque[Job] = deque()  # the first one is in hand
        self._full = False  # the spool takes nothing now
        self._error: Exception | None = None  # of the first job; the thread waits until somebody has raised it
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have `job` done behind those before it. Waits while there is no room; raises what an earlier one raised."""
        with self._changed:
            self._wait(lambda: len(self._jobs) < self._held and not self._full)
            self._jobs.append(job)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every job is done; raises what one of them raised."""
        with self._changed:
            self._wait(lambda: not self._jobs)

    def close(self) -> None:
        """End the thread once it has done what it holds; what fails then is lost, and said in the log."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._jobs:
            log.error("%d step batches never reached the spool and are lost: %s", len(self._jobs), self._error)

    def _wait(self, ready: Callable[[], bool]) -> None:
        told = time.monotonic()
        while True:
            if self._error is not None:
                error, self._error = self._error, None  # the thread tries the job again
                self._changed.notify_all()
                raise error
            if ready():
                return
            self._changed.wait(_AGAIN_S)
            if not self._full and not ready() and time.monotonic() - told > _AGAIN_S:
                told = time.monotonic()
                self._observer.message(
                    f"the spool's disk is slow: the robot holds, {len(self._jobs)} step batches wait"
                )

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except SpoolFull as full:
                self._hold(full)
            except Exception as error:
                self._fail(error)
            else:
                with self._changed:
                    self._jobs.popleft()
                    self._full = False
                    self._changed.notify_all()

    def _next(self) -> Job | None:
        """The first job, once there is one and no error waits to be raised; None: closed, nothing is left to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._jobs and self._error is None))
            return self._jobs[0] if self._jobs and self._error is None else None

    def _hold(self, full: SpoolFull) -> None:
        """The robot holds until there is room: nothing is overwritten."""
        if self._stop or self._closed:
            self._fail(full)
            return
        with self._changed:
            self._full = True
        self._observer.message(f"{full}; the robot holds until the learner has taken some")
        self._stop.wait(_AGAIN_S)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
