"""What the trainer does when the disk refuses to be written: it waits, says so, and does the same write again.

    take_step ─▶ due: [log row | publish | checkpoint] ─▶ catch_up ─▶ refused? no step until all of it is written

Nothing is lost meanwhile: no step is taken, so that what is due is written later as it would have been now. The policy
server goes on with the version it has. An error that no freed space mends is the caller's.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from serl_launcher.learner.faults import Reminder
from serl_launcher.run.files import disk_trouble

log = logging.getLogger("trainer")
RETRY_S = 0.5  # between two tries; a report to the gateway lies between


class DiskWait:
    """Writes that are due, in order, and what the trainer waits for. meanwhile: what goes on, for people."""

    def __init__(self, meanwhile: Callable[[], str]) -> None:
        self._meanwhile = meanwhile
        self._due: deque[Callable[[], object]] = deque()
        self._reminder = Reminder()
        self._since: float | None = None  # time.monotonic() of the first refusal
        self.waits: str | None = None  # for people; None: nothing is refused

    @property
    def behind(self) -> bool:
        """Is something due that is not written yet?"""
        return bool(self._due)

    def write(self, due: Iterable[Callable[[], object]]) -> None:
        """Do these writes. OSError when the disk refuses one: that one and those behind it stay due."""
        self._due.extend(due)
        self.catch_up()

    def catch_up(self) -> None:
        """Do what is due. OSError as `write`."""
        while self._due:
            self._due[0]()
            self._due.popleft()

    def refused(self, error: OSError) -> None:
        """A write of the trainer's turn failed: wait a moment, or raise what will not pass."""
        trouble = disk_trouble(error)
        if trouble is None:
            raise error
        self._since = self._since or time.monotonic()
        where = f" ({error.filename})" if error.filename else ""
        self.waits = f"{trouble}: training waits{self._meanwhile()}"
        self._reminder.say(f"{self.waits}{where}")
        time.sleep(RETRY_S)

    def taken(self) -> None:
        """A whole turn went by without a refusal."""
        if self._since is not None:
            log.warning("the disk takes writes again after %.0f s: training goes on", time.monotonic() - self._since)
        self._since = self.waits = None
