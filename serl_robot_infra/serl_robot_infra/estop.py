"""The emergency stop of this host: local, latched, and independent of the learner and the network.

Pressed by a key at the actor's terminal (`rollout.estop_key`), by SIGUSR1 to the actor, by the file `runs/<run>/estop`
(`tools/estop.py`, or `touch`), or by code. Checked by the guard's thread within every period and by the actor loop
before each action.

    free ──key, signal, file, press()──▶ latched: the file exists, with the reason ──a person removes the file──▶ free

The file is the latch, so it outlives the process: an actor that is started again does not move either.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class EmergencyStop:
    """Asked by several threads. path: the latch file, whose folder exists or can be made."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._pressed_by = ""  # a press that is not in the file yet
        self._latched = False
        self._signals: int | None = None  # pipe that the C signal handler writes to
        path.parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """SIGUSR1 of this process presses it meanwhile; main thread only.

        Python runs signal handlers in the main thread, which may hang in a driver; the wake-up pipe is written at once,
        and the guard reads it.
        """
        self._signals, written = os.pipe()
        for end in (self._signals, written):
            os.set_blocking(end, False)
        handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
        pipe = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(pipe)
            signal.signal(signal.SIGUSR1, handler)
            with self._lock:
                os.close(self._signals)
                self._signals = None
            os.close(written)

    def press(self, by: str) -> None:
        """Stop. Takes effect at the next look of the guard or the loop."""
        self._pressed_by = by  # one assignment: safe in a signal handler

    def reason(self) -> str | None:
        """Who pressed it, while it is latched; None when the robot may move."""
        with self._lock:
            self._read_signals()
            if not self._pressed_by and not self._latched and not self.path.exists():
                return None
            return self._reason()

    def _reason(self) -> str | None:
        if self._pressed_by and not self._write():
            return f"{self._pressed_by} (the latch file {self.path} cannot be written: restart the actor to go on)"
        try:
            text = self.path.read_text().strip()
        except FileNotFoundError:
            self._latched = False  # a person removed it
            return None
        except OSError as error:
            text = f"{self.path} cannot be read: {error.strerror}"
        self._latched = True
        return text or f"the file {self.path}"

    def _write(self) -> bool:
        """Put the press into the file; False when that is impossible, and it stays pressed in memory."""
        try:
            if not self.path.exists():
                self.path.write_text(f"{self._pressed_by} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        except OSError:
            return False
        self._pressed_by = ""
        return True

    def _read_signals(self) -> None:
        if self._signals is None:
            return
        with contextlib.suppress(BlockingIOError):
            while numbers := os.read(self._signals, 64):
                if signal.SIGUSR1 in numbers:
                    self.press("SIGUSR1")
