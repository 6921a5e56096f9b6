"""How a role shows that its work goes on: its work loop beats, and says beforehand what will take longer.

    work loop ─▶ beat() | busy(seconds, doing) ─▶ 64 bytes of memory that the supervisor holds ─▶ supervisor.pulse

Called from the one thread that does the role's work; a helper thread that beat would hide that the work stands still.
The memory is opened through /proc, so neither a full nor a slow disk holds a beat up, and only a change counts, so no
clock is involved. Without a supervisor nobody listens. Torch-free.
"""

import contextlib
import faulthandler
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

BEAT_FILE = "FLOWSERL_BEAT_FILE"  # names the memory in the role's environment
DUMP_SIGNAL = signal.SIGUSR2  # a role that has beaten writes the stack of each of its threads to its log
SIZE = 64
_RECORD = struct.Struct("<QId44s")


@dataclass(frozen=True, slots=True)
class Beat:
    """One beat."""

    count: int = 0  # of this process, from 1; 0: none yet
    pid: int = 0  # who beats: of the trainer, not of its launcher
    allowed_s: float = 0.0  # how long until the next one at most; 0: the supervisor's usual patience
    doing: str = ""  # what takes so long, for people

    def encode(self) -> bytes:
        """`SIZE` bytes."""
        return _RECORD.pack(self.count, self.pid, self.allowed_s, self.doing.encode()[:44])

    @staticmethod
    def decode(raw: bytes) -> "Beat":
        """The beat in `SIZE` bytes."""
        count, pid, allowed_s, doing = _RECORD.unpack(raw)
        return Beat(count, pid, allowed_s, doing.rstrip(b"\0").decode(errors="replace"))


class _Heart:
    """This process's end of the memory."""

    def __init__(self) -> None:
        self._count = 0
        self._busy: list[tuple[float, str]] = []  # innermost last
        self._fd: int | None = None
        if path := os.environ.get(BEAT_FILE):
            try:
                self._fd = os.open(path, os.O_WRONLY)
            except OSError as error:  # the role works; that it hangs would not be noticed
                print(f"no sign of life can be given through {path}: {error.strerror}", file=sys.stderr, flush=True)
                return
            faulthandler.register(DUMP_SIGNAL, all_threads=True)

    def beat(self) -> None:
        if self._fd is None:
            return
        self._count += 1
        allowed_s, doing = self._busy[-1] if self._busy else (0.0, "")
        os.pwrite(self._fd, Beat(self._count, os.getpid(), allowed_s, doing).encode(), 0)

    @contextlib.contextmanager
    def busy(self, seconds: float, doing: str) -> Iterator[None]:
        self._busy.append((seconds, doing))
        self.beat()
        try:
            yield
        finally:
            self._busy.pop()
            self.beat()


_heart: _Heart | None = None


def _mine() -> _Heart:
    global _heart
    if _heart is None:
        _heart = _Heart()
    return _heart


def is_watched() -> bool:
    """Was this process started by a supervisor?"""
    return BEAT_FILE in os.environ


def beat() -> None:
    """The work goes on; call it at least once a second from the work loop."""
    _mine().beat()


@contextlib.contextmanager
def busy(seconds: float, doing: str) -> Iterator[None]:
    """What happens inside may take so long without a beat; also a decorator. doing: for people, 44 bytes."""
    with _mine().busy(seconds, doing):
        yield


class Pace:
    """An allowance for work that is done again and again, learned from how long it took lately.

    first_s: for the first time (it may compile). least_s: from then on, or ten times the longest one if that is more.
    """

    def __init__(self, doing: str, first_s: float = 600.0, least_s: float = 30.0) -> None:
        self._doing, self._first_s, self._least_s = doing, first_s, least_s
        self._longest_s: float | None = None  # forgets a tenth each time

    @property
    def allowed_s(self) -> float:
        """Of the next time."""
        return self._first_s if self._longest_s is None else max(self._least_s, 10 * self._longest_s)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """The work happens inside."""
        started = time.monotonic()
        with busy(self.allowed_s, self._doing):
            yield
        self._longest_s = max(time.monotonic() - started, 0.9 * (self._longest_s or 0.0))
