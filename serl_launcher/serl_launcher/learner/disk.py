"""What the trainer writes: in a thread while it trains on; and when the disk refuses, it waits and says so.

    take_step ─▶ begin: [version | checkpoint] copied between two steps ─▶ thread writes them, in order ─▶ written
              └▶ write: log row, at once                                    └─ refused ─▶ no step until all is written

At most one copy of each kind exists: the next one of a kind waits for the one before. `finish` waits for all of them:
at a stage's end, before parameters are brought back, and at the trainer's end. A step counts for the gateway once what
was due after it is written (`counted`). Nothing is lost on a disk that refuses: what is due is written later as it
would have been then. The policy server goes on with the version it has. An error that no freed space mends is the
caller's.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Lock

from serl_launcher.learner.copies import NoRoomError
from serl_launcher.learner.faults import Reminder
from serl_launcher.run.alive import busy
from serl_launcher.run.files import disk_trouble

log = logging.getLogger("trainer")
RETRY_S = 0.5  # between two tries; a report to the gateway lies between
LONGEST_S = 1800.0  # a write that takes longer hangs


@dataclass(slots=True, eq=False)
class Write:
    """One version or checkpoint that is due."""

    kind: str  # for people
    copy: Callable[[], Callable[[], None]]  # takes what is to be written; the result writes it, in any thread
    now: Callable[[], None]  # both at once
    before: Mapping[str, int] = field(default_factory=dict)  # stage -> steps that count until it is written
    job: Callable[[], None] | None = None  # what `copy` returned

    def run(self) -> None:
        """Write it while training waits. OSError when the disk refuses."""
        with busy(LONGEST_S, f"writing a {self.kind}"):
            (self.job or self.now)()


class DiskWait:
    """Writes that are due, in order, and what the trainer waits for. meanwhile: what goes on, for people."""

    def __init__(self, meanwhile: Callable[[], str]) -> None:
        self._meanwhile = meanwhile
        self._due: deque[Callable[[], object]] = deque()  # at once
        self._begun: deque[Write] = deque()  # the thread's, but where it ended with an error or is not running
        self._pool, self._lock = ThreadPoolExecutor(1, "writes"), Lock()
        self._thread: Future[None] | None = None
        self._reminder = Reminder()
        self._since: float | None = None  # time.monotonic() of the first refusal
        self._told_of_room = False
        self.waits: str | None = None  # for people; None: nothing is refused
        self.took_s: dict[str, float] = {}  # kind -> the thread's time for the last one
        self.stall_s = 0.0  # how long the last `begin` held training up

    @property
    def behind(self) -> bool:
        """Is something due that is not written yet?"""
        return bool(self._due or self._begun)

    def counted(self, steps: Mapping[str, int], last: Mapping[str, int]) -> dict[str, int]:
        """Of the steps taken of each stage, those after which all is written that was due. last: what was said so far,
        which stands while the disk refuses a write that has no copy."""
        with self._lock:
            oldest = self._begun[0].before if self._begun else None
        return dict(last if self._due else steps if oldest is None else oldest)

    def write(self, due: Iterable[Callable[[], object]]) -> None:
        """Do these writes now. OSError when the disk refuses one: that one and those behind it stay due."""
        self._due.extend(due)
        self._do()

    def begin(self, due: Iterable[Write]) -> None:
        """Copy what is due, let the thread write it. Waits while one of its kind is being written.

        OSError when the disk refused that one: all of these stay due, and what they write must not change.
        """
        began = time.perf_counter()
        due = list(due)
        with self._lock:
            self._begun.extend(due)
        try:
            for one in due:
                if one in self._begun:  # else it was written at once, for lack of memory
                    self._copy(one)
        finally:
            self.stall_s = time.perf_counter() - began

    def _copy(self, one: Write) -> None:
        if any(other.kind == one.kind and other is not one for other in list(self._begun)):
            self.finish_those_before(one)
        try:
            one.job = one.copy()
        except NoRoomError as lack:
            self._tell_of_room(one.kind, lack)
            self.finish()
            return
        with self._lock:
            if self._thread is None:
                self._thread = self._pool.submit(self._run)

    def finish_those_before(self, one: Write) -> None:
        """Wait until what was due before this one is written. OSError when the disk refuses."""
        self.still()
        self._raise_refusal()
        while self._begun and self._begun[0] is not one:
            self._begun[0].run()
            self._begun.popleft()

    def _run(self) -> None:
        """The thread: what is copied, in order. An error ends it, and what is due stays."""
        while True:
            with self._lock:
                head = self._begun[0] if self._begun else None
                if head is None or head.job is None:
                    self._thread = None
                    return
            began = time.perf_counter()
            head.job()
            self.took_s[head.kind] = time.perf_counter() - began
            with self._lock:
                self._begun.popleft()

    def _raise_refusal(self) -> None:
        """What ended the thread, once: its writes are the caller's then."""
        with self._lock:
            ended = self._thread if self._thread is not None and self._thread.done() else None
            if ended is not None:
                self._thread = None
        if ended is not None:
            ended.result()

    def catch_up(self) -> None:
        """Do what the disk refused before; what is being written goes on. OSError as `write`."""
        self._raise_refusal()
        self._do()
        while self._thread is None and self._begun:
            self._begun[0].run()
            self._begun.popleft()

    def _do(self) -> None:
        while self._due:
            self._due[0]()
            self._due.popleft()

    def still(self) -> None:
        """Wait until nothing is being written: it is on disk, or refused and due."""
        if (thread := self._thread) is not None and not thread.done():
            with busy(LONGEST_S, "waiting for a version or checkpoint"):
                wait([thread])

    def finish(self) -> None:
        """Wait until all is written. OSError when the disk refuses."""
        self.still()
        self.catch_up()

    def close(self) -> None:
        """Nothing more is to be written; what is being written will be."""
        self.still()
        self._pool.shutdown()

    def _tell_of_room(self, kind: str, lack: NoRoomError) -> None:
        if not self._told_of_room:
            self._told_of_room = True
            log.warning("a %s is written while training waits: there is no memory for %s", kind, lack)

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
