"""Who was started by start.sh and still runs: runs/.launch/<pid>.json, one file per launcher process.

Written by start.py; `start.sh --stop` reads it and ends these processes and no other: a pid counts only while
its process has the start time that was written down.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from serl_config.process import process_stat

STOP_PATIENCE_S = 240.0  # a learner writes out its dataset before it goes


@dataclass(frozen=True, slots=True)
class Entry:
    """One launcher process."""

    pid: int
    started: int  # kernel ticks since boot, field 22 of /proc/<pid>/stat
    name: str  # launcher, or the side that it keeps in a tmux pane: actor, learner
    run_dir: str
    socket: str | None  # tmux server that belongs to it

    @property
    def alive(self) -> bool:
        """Does this very process run?"""
        fields = process_stat(self.pid)
        return bool(fields) and fields[0] not in "ZX" and int(fields[19]) == self.started


class Registry:
    """The entries of one checkout."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "runs" / ".launch"

    def register(self, name: str, run_dir: Path, socket: str | None = None) -> Entry:
        """Write this process down."""
        pid = os.getpid()
        entry = Entry(pid, int(process_stat(pid)[19]), name, str(run_dir), socket)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{pid}.tmp"
        temporary.write_text(json.dumps(asdict(entry)))
        temporary.replace(self.folder / f"{pid}.json")
        return entry

    def forget(self, pid: int) -> None:
        """Remove an entry."""
        (self.folder / f"{pid}.json").unlink(missing_ok=True)

    def alive(self, run_dir: Path | None = None) -> Iterator[Entry]:
        """Entries whose process runs, of one run or of all; the others' files are removed."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                entry = Entry(**json.loads(path.read_text()))
            except FileNotFoundError:  # its process has just ended
                continue
            if not entry.alive:
                path.unlink(missing_ok=True)
            elif run_dir is None or entry.run_dir == str(run_dir):
                yield entry

    def stop(self, run_dir: Path | None = None) -> None:
        """End all that runs, of one run or of all."""
        entries = list(self.alive(run_dir))
        # A launcher stops its own sides, in order; the sides of one that is gone are stopped here.
        for name in ("launcher", "actor", "learner"):
            self.end([entry for entry in entries if entry.name == name])

    def end(self, entries: Sequence[Entry]) -> None:
        """SIGTERM to each, wait, SIGKILL; returns when none of them runs."""
        for entry in entries:
            _signal(entry, signal.SIGTERM)
        deadline = time.monotonic() + STOP_PATIENCE_S
        while any(entry.alive for entry in entries) and time.monotonic() < deadline:
            time.sleep(0.1)
        for entry in entries:
            _signal(entry, signal.SIGKILL)
            self.forget(entry.pid)


def _signal(entry: Entry, signum: signal.Signals) -> None:
    if entry.alive:
        os.kill(entry.pid, signum)
