"""Says on the learner's screen when the run folder's disk takes no more, and when it does again.

Called by the supervisor once a second. The roles wait and say so in their logs and in the status, which lie on that
very disk: while it is full, the screen is where a person can read it. A small file is written and removed again, so
that quotas and disks that turned read-only are noticed, too.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from serl_launcher.run.files import disk_trouble

PROBE_BYTES = 64 << 10
REMIND_S = 30.0


class DiskWatch:
    """folder: of the run. say: puts a line on the screen."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._probe, self._say = folder / ".room", say
        self._trouble: str | None = None
        self._told = 0.0  # time.monotonic()

    def look(self) -> None:
        """Try a write; tell what changed, and again every 30 s while it lasts."""
        trouble, now = self._refusal(), time.monotonic()
        if trouble is None:
            if self._trouble is not None:
                self._say(f"{self._probe.parent} takes writes again: recording and training go on")
        elif trouble != self._trouble or now - self._told > REMIND_S:
            self._told = now
            self._say(
                f"{trouble} at {self._probe.parent}: recording and training wait until it takes writes again; actions "
                "go on being answered"
            )
        self._trouble = trouble

    def _refusal(self) -> str | None:
        try:
            self._probe.write_bytes(bytes(PROBE_BYTES))
            return None
        except OSError as error:
            return disk_trouble(error)
        finally:
            with contextlib.suppress(OSError):
                self._probe.unlink(missing_ok=True)
