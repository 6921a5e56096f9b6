"""Says on the learner's screen when the run folder's disk takes no more, and when it does again.

The supervisor asks once a second. The roles wait and say so in their logs and in the status, which lie on that very
disk: while it is full, the screen is where a person can read it. A thread writes a small file and removes it again, so
that quotas, disks that turned read-only and disks that hang are noticed, too, and nothing else waits for them.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from serl_launcher.run.files import disk_trouble

PROBE_BYTES = 64 << 10
PROBE_S = 1.0
HANGING_S = 5.0
REMIND_S = 30.0


class DiskWatch:
    """folder: of the run. say: puts a line on the screen."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._probe, self._say = folder / ".room", say
        self._found: str | None = None  # by the last probe
        self._since: float | None = None  # time.monotonic() of the probe in hand
        self._trouble: str | None = None  # that was told last
        self._told = 0.0  # time.monotonic()
        threading.Thread(target=self._watch, name="disk", daemon=True).start()

    def look(self) -> None:
        """Tell what changed, and again every 30 s while it lasts. Waits for no disk."""
        trouble, now, since = self._found, time.monotonic(), self._since
        if since is not None and now - since > HANGING_S:
            trouble = "the disk does not answer"
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

    def _watch(self) -> None:
        while True:
            self._since = time.monotonic()
            self._found = self._refusal()
            self._since = None
            time.sleep(PROBE_S)

    def _refusal(self) -> str | None:
        try:
            self._probe.write_bytes(bytes(PROBE_BYTES))
            return None
        except OSError as error:
            return disk_trouble(error)
        finally:
            with contextlib.suppress(OSError):
                self._probe.unlink(missing_ok=True)
