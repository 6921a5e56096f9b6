"""The emergency stop of this host: local, latched, and independent of the learner, the network and the disk.

Pressed by a key at the actor's terminal (`rollout.estop_key`), by SIGUSR1 to the actor, by the file `runs/<run>/estop`
(`tools/estop.py`, or `touch`), or by code. The guard asks it within every period, the actor loop before each action.

    free ──key, signal, file, press()──▶ latched: the file exists, with the reason ──a person removes the file──▶ free
              │ in memory, at once          ▲
              └── latch thread ─────────────┘ write, fsync; look at the file again and again

A press counts before it is written, and asking touches no disk: only the latch thread does, and a disk that hangs
hangs nothing else. The file outlives the process and a power cut: an actor that is started again does not move either.
What cannot be read, or not be looked at for a second, counts as pressed.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_S = 0.01  # between two looks at the file
HANGING_S = 1.0  # a look that takes longer counts as pressed
_SEEN_AT_MOST_S = 0.1  # of such a look, by one question: a driver may have stopped every thread of this process
_RETRY_S = 1.0  # until a press that could not be written is written again
_LONGEST = 200  # characters of a reason


class EmergencyStop:
    """Asked by several threads. Construction looks at the file once, so a latched one is known before anything moves.

    Args:
        path: the latch file, whose folder exists or can be made.
        name: this actor's `unique_identifier`: tells `tools/estop.py` who is there, in `estop.heard/<name>`.
    """

    def __init__(self, path: Path, name: str | None = None):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.on_change: Callable[[], None] = lambda: None  # called when it is pressed or released, by any thread
        self._pressed_by = ""  # a press that is not in the file yet
        self._unwritable = ""  # why it could not be written
        self._latched: str | None = self._read()  # what the file said at the last look
        self._look = 0  # number of the look in hand; 0: none
        self._looks = 0
        self._watched = 0  # the look that the last asker saw in hand
        self._watched_s = 0.0  # how long askers have seen that one
        self._asked = time.monotonic()
        self._lock = threading.Lock()
        self._heard = _Heard(path.with_name("estop.heard") / name) if name else None
        self._due = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._keep, name="estop-latch", daemon=True)
        self._thread.start()

    def press(self, by: str) -> None:
        """Stop: counts from now on, and is written afterwards."""
        self._pressed_by = by
        self.on_change()
        self._due.set()

    def reason(self) -> str | None:
        """Who pressed it, while it is latched; None when the robot may move. Touches no disk."""
        if by := self._pressed_by:
            problem = (
                self._unwritable and f" (the latch file {self.path} cannot be written: restart the actor to go on)"
            )
            return by + problem
        if (latched := self._latched) is not None:
            return latched
        if (seconds := self._hanging_s()) > HANGING_S:
            return f"{self.path} cannot be looked at for {seconds:.0f} s"
        return None

    def obeyed(self) -> None:
        """The guard has stopped the robot for it: whoever pressed may be told."""
        if self._heard:
            self._heard.obeyed = True
            self._due.set()

    def close(self) -> None:
        """End the latch thread, after a press that is not written yet (a disk that hangs is not waited for)."""
        self._closing = True
        self._due.set()
        self._thread.join(_RETRY_S)
        if self._heard and not self._thread.is_alive():
            self._heard.close()

    def _hanging_s(self) -> float:
        """Seconds that the look in hand has taken, as far as somebody was there to see it."""
        with self._lock:
            now, look = time.monotonic(), self._look
            same = look != 0 and look == self._watched
            self._watched_s = self._watched_s + min(now - self._asked, _SEEN_AT_MOST_S) if same else 0.0
            self._watched, self._asked = look, now
            return self._watched_s

    def _keep(self) -> None:
        retry_at = 0.0
        while not (self._closing and (not self._pressed_by or self._unwritable)):
            self._looks += 1
            self._look = self._looks
            if (by := self._pressed_by) and time.monotonic() >= retry_at:
                self._unwritable = self._write(by)
                retry_at = time.monotonic() + _RETRY_S if self._unwritable else 0.0
                if not self._unwritable:  # from now on the file alone says it
                    self._latched, self._pressed_by = by, ""
            latched = self._read()
            self._look = 0
            if latched != self._latched:
                self._latched = latched
                self.on_change()
            if self._heard:
                self._heard.tell(latched is not None or bool(self._pressed_by))
            self._due.wait(LOOK_S)
            self._due.clear()

    def _read(self) -> str | None:
        """What the latch says; None when there is none."""
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            if not os.path.lexists(self.path) and self.path.parent.is_dir():
                return None
            return f"{self.path} cannot be read: its folder is gone, or it is a link to nothing"
        except OSError as error:
            return f"{self.path} cannot be read: {error.strerror}"
        words = "".join(c for c in " ".join(text.split()) if c.isprintable())[:_LONGEST]
        return words or f"the file {self.path}"

    def _write(self, by: str) -> str:
        """Put the press into the file (the first stays), so that it survives a power cut; "" or why it cannot be."""
        try:
            try:
                file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return ""
            try:
                os.write(file, f"{by} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
                os.fsync(file)
            finally:
                os.close(file)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            return error.strerror or str(error)
        return ""


class _Heard:
    """`estop.heard/<name>`: locked while this actor lives, and says whether it stopped. The latch thread's alone."""

    def __init__(self, path: Path):
        self.obeyed = False
        self._path, self._file, self._told = path, -1, ""

    def close(self) -> None:
        """This actor is gone, as its end would show."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def tell(self, latched: bool) -> None:
        """Bring the file up to date."""
        self.obeyed = self.obeyed and latched
        line = f"pid {os.getpid()} {'stopped' if self.obeyed else 'latched' if latched else 'listening'}\n"
        if line == self._told:
            return
        self._told = line
        try:
            if self._file < 0:
                self._path.parent.mkdir(exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(self._file, line.encode(), 0)
            os.ftruncate(self._file, len(line))
        except OSError as error:
            log.warning("%s: %s: tools/estop.py cannot see this actor; the e-stop works", self._path, error.strerror)
