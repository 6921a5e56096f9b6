"""Episodes that the dataset goes on without: quarantine.jsonl in the run folder, and how a deadly one is found out.

    a record that no longer fits ─┐
    an exception at an episode ───┼─▶ Quarantine.add ─▶ quarantine.jsonl ─▶ status, check_run, summary
    MAX_DEATHS of the process ────┘      ▲
    Attempt.begin ─▶ exporter.attempt ─▶ the next process reads at which episode the last one died

Written by the exporter alone. The journal keeps what is set aside here, and training has it.
"""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from serl_launcher.run.files import clear, seal, unseal

_log = logging.getLogger(__name__)
MAX_DEATHS = 3  # in a row at one episode
_ATTEMPT_BYTES = 64


def quarantine_path(run_dir: Path) -> Path:
    return Path(run_dir) / "quarantine.jsonl"


def read_quarantine(run_dir: Path) -> list[dict[str, Any]]:
    """The lines: `{ordinal, episode_id, item, why}`, of a record without an episode only the last two. A line that a
    kill tore, or that is damaged, is passed over: its episode is found out again."""
    path = quarantine_path(run_dir)
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError):
            rows.append(unseal(json.loads(line)))
    if len(rows) < len(lines) or (path.is_file() and not rows):
        _log.warning("%s is damaged: %d whole lines; what others set aside is found out again", path, len(rows))
    return rows


class Quarantine:
    """What of one run's journal is set aside."""

    def __init__(self, run_dir: Path) -> None:
        self._path = quarantine_path(run_dir)
        clear(self._path)
        rows = read_quarantine(run_dir)
        self._episodes = {(row.get("ordinal"), row.get("episode_id")) for row in rows if row.get("ordinal") is not None}
        self._items = {row["item"] for row in rows if row.get("item") is not None}

    @property
    def count(self) -> int:
        """Episodes and items."""
        return len(self._episodes) + len(self._items)

    def holds(self, ordinal: int, episode_id: str) -> bool:
        """Is this episode of this journal set aside?"""
        return (ordinal, episode_id) in self._episodes

    def add(self, ordinal: int, episode_id: str, why: str) -> None:
        """Set an episode aside. OSError: the disk takes no line; it is tried again with the episode."""
        _log.error("episode %s (ordinal %d) is set aside, the dataset goes on without it: %s", episode_id, ordinal, why)
        self._append({"ordinal": ordinal, "episode_id": episode_id, "item": None, "why": why})
        self._episodes.add((ordinal, episode_id))

    def add_item(self, item: str, why: str) -> None:
        """Set a record aside that belongs to no episode any more; once."""
        if item not in self._items:
            _log.error("item %s of the journal does not fit and is left out: %s", item, why)
            self._append({"ordinal": None, "episode_id": None, "item": item, "why": why})
            self._items.add(item)

    def _append(self, row: dict[str, Any]) -> None:
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("ab") as file:
            file.write((b"\n" if torn and file.tell() else b"") + json.dumps(seal(row)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class Attempt:
    """Which episode is in hand, rewritten in place: what a process that died of it leaves for the next one.

    `suspect`: the episode at which the last process died, -1 for none; `deaths`: how many died there in a row.
    """

    def __init__(self, run_dir: Path) -> None:
        self._fd: int | None = None
        self.suspect, self.deaths = -1, 0
        clear(Path(run_dir) / "exporter.attempt")
        with contextlib.suppress(OSError):  # no room for 64 bytes: nothing is exported either
            self._fd = os.open(Path(run_dir) / "exporter.attempt", os.O_RDWR | os.O_CREAT, 0o644)
            with contextlib.suppress(ValueError):
                ordinal, deaths = map(int, os.pread(self._fd, _ATTEMPT_BYTES, 0).split())
                self.suspect, self.deaths = ordinal, deaths + (ordinal >= 0)
            self._write(-1, 0)

    def begin(self, ordinal: int) -> None:
        """The work on this episode begins."""
        self._write(ordinal, self.deaths if ordinal == self.suspect else 0)

    def end(self) -> None:
        """It went well, or failed in words."""
        self._write(-1, 0)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, ordinal: int, deaths: int) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, f"{ordinal} {deaths}".ljust(_ATTEMPT_BYTES).encode(), 0)
