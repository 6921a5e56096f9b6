"""The ring of a host beyond the first, as its ranks read it: a RingReader that outlives the follower.

    rank 0's decision: rows ─▶ reach(rows) ─▶ waits until the follower here has filled its ring so far ─▶ view

Two rings of one journal have the same rows and frames (replay.filling), so when a follower was started again, and its
ring is another file, a view goes on with the new one where it stood. status.json of this host names the file.
"""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from serl_launcher.replay.ring import EpisodeRow, RingError, RingReader
from serl_launcher.run.alive import busy
from serl_launcher.run.files import read_json

log = logging.getLogger("trainer")
LOOK_S = 0.02
TELL_S = 5.0


class BehindError(RuntimeError):
    """The follower did not get what the other hosts train on within the patience; the message is for people."""


class FollowedRing:
    """status: status.json of this host; patience_s: how long `reach` waits. BehindError when no ring comes up in it."""

    def __init__(self, status: Path, patience_s: float) -> None:
        self._status, self._patience_s = status, patience_s
        self._path: str | None = None
        self._ring = self._newest()
        self.until: int | None = None  # rows that `episodes` goes to

    @property
    def path(self) -> Path:
        return self._ring.path

    @property
    def rows(self) -> int:
        """Episodes committed so far, those that are gone included."""
        return self._ring.rows

    @property
    def first_valid(self) -> int:
        """Absolute number of the oldest frame that is still whole."""
        return self._ring.first_valid

    @property
    def head(self) -> int:
        """Absolute number of the next frame to be written."""
        return self._ring.head

    def reach(self, rows: int) -> None:
        """Wait until the ring here holds what the first host's did at so many rows; `episodes` ends there then."""
        began, told = time.monotonic(), False
        with busy(self._patience_s + TELL_S, "waiting for the follower"):
            while self._ring.rows < rows:
                waited = time.monotonic() - began
                if waited > self._patience_s:
                    raise BehindError(f"{self._behind(rows)} after {waited:.0f} s (follower.patience_s)")
                if waited > TELL_S and not told:
                    told = True
                    log.warning("%s: this rank waits, for %.0f s at most", self._behind(rows), self._patience_s)
                time.sleep(LOOK_S)
                self._ring = self._newest(self._ring)
        if told:
            log.warning("the follower has caught up after %.0f s", time.monotonic() - began)
        self.until = rows

    def episodes(self, since_row: int = 0) -> list[EpisodeRow]:
        """Of `RingReader`, up to `until`."""
        return [row for row in self._ring.episodes(since_row) if self.until is None or row.row < self.until]

    def gather(self, frames: np.ndarray, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Of `RingReader`."""
        return self._ring.gather(frames, keys)

    def _behind(self, rows: int) -> str:
        return f"the follower of this host is at episode {self._ring.rows} of {rows} that rank 0 trains on"

    def _newest(self, ring: RingReader | None = None) -> RingReader:
        """The ring that status.json names now, or the one that there is; the first one is waited for."""
        deadline = time.monotonic() + self._patience_s
        while True:
            path = (read_json(self._status) or {}).get("ring")
            if path and path != self._path:
                try:
                    found = RingReader(path)
                except (RingError, OSError):  # of a follower that is gone: the next one writes another name
                    found = None
                if found is not None:
                    self._path = path
                    return found
            if ring is not None:
                return ring
            if time.monotonic() > deadline:
                raise BehindError(f"no follower filled a ring on this host within {self._patience_s:.0f} s")
            with busy(self._patience_s + TELL_S, "waiting for the follower"):
                time.sleep(LOOK_S)
