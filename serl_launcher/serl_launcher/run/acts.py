"""What people did to a run: runs/<name>/acts.jsonl, a line an act, on disk before whoever asked is answered.

    operate.py, console ─▶ gateway ──┐                       ┌─▶ InForce ─▶ gateway, trainer, policy server, tools:
    audit_reward.py --relabel, start ┴─▶ append ─▶ acts.jsonl ┘            at their start, and whenever it has grown

What holds is a fold of the lines (`run.in_force`), so that it survives the kill of any process. A line is
`{n, id, time, by, act, …}` with its crc32; `n` counts from 1. An `id` that is there already is not done twice. A last
line without its end was never answered: the next append cuts it off. A damaged line says nothing any more and is named;
so is what is missing at the end, by acts.mark, which has the number of the last act. Torch-free.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from serl_launcher.run.files import (
    DamagedFileError,
    append_whole,
    clear,
    read_sealed,
    seal,
    sync,
    unseal,
    write_sealed,
)
from serl_launcher.run.in_force import DAMAGED, InForce, fold
from serl_launcher.run.paths import RunPaths

log = logging.getLogger(__name__)
NEEDED = ("n", "id", "time", "by", "act")
PATIENCE_S = 1.0  # for another process's append, or its pruning of versions: a few milliseconds each

Row = dict[str, Any]


class ActsLedger:
    """The acts of one run. Any number of processes may read and append; one thread each."""

    def __init__(self, run_dir: Path) -> None:
        self.path = RunPaths(Path(run_dir)).acts
        self._stamp: tuple[int, ...] | None = (-1,)  # of what was read last
        self._rows: list[Row] = []
        self._state = InForce()

    @property
    def state(self) -> InForce:
        """What is in force now; the file is read again when it has changed."""
        self.refresh()
        return self._state

    @property
    def rows(self) -> list[Row]:
        """Every act, oldest first; a damaged one is `{n, act: "damaged"}`."""
        self.refresh()
        return self._rows

    def refresh(self) -> bool:
        """Look whether the file has changed, and read it then: True."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        before = set(self._state.damaged)
        self._rows = read(self.path)
        self._state = fold(self._rows)
        for line in self._state.damaged:
            if line not in before:
                log.warning(
                    "%s line %d is damaged or missing: what was asked there is not known, so robots and training are "
                    "taken for paused until somebody says resume and training_resume (tools/operate.py)",
                    self.path, line,
                )  # fmt: skip
        return True

    def append(self, *acts: Mapping[str, Any], by: str, time_: str | None = None) -> list[Row]:
        """Keep these acts, all or none, and return their lines; they are on disk then.

        An act whose `id` is known is not kept again: its line of then is returned. OSError: the disk refuses, or
        somebody holds the file; nothing was kept.
        """
        clear(self.path)
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            lock(descriptor, self.path)
            _cut_torn_line(descriptor)
            self.refresh()
            known = {row["id"]: row for row in self._rows if "id" in row}
            rows = [known.get(act.get("id")) or self._row(act, by, time_) for act in acts]
            fresh = [row for row in rows if row["id"] not in known]
            if fresh:
                if self._rows and self._rows[-1].get("missing"):
                    fresh.insert(0, self._row({"act": DAMAGED, "line": self._rows.pop()["line"]}, "acts.mark", None))
                self._number(fresh)
                append_whole(descriptor, "".join(json.dumps(seal(row)) + "\n" for row in fresh).encode())
                _sync_or_take_back(descriptor, fresh)
        finally:
            os.close(descriptor)
        if is_new:
            sync(self.path.parent)
        self._mark(fresh)
        self.refresh()
        return rows

    def _row(self, act: Mapping[str, Any], by: str, time_: str | None) -> Row:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {"n": 0, "id": uuid4().hex[:16], "time": time_ or now, "by": by, **act}
        return row | {"id": row["id"] or uuid4().hex[:16]}

    def _mark(self, rows: list[Row]) -> None:
        try:
            if rows:
                write_sealed(mark_of(self.path), {"n": rows[-1]["n"]})
        except OSError as error:
            log.warning("cannot write %s (%s): it lags behind the acts", mark_of(self.path), error.strerror)

    def _number(self, rows: list[Row]) -> None:
        last = max((row["n"] for row in self._rows), default=0)
        for n, row in enumerate(rows, start=last + 1):
            row["n"] = n

    def _look(self) -> tuple[int, ...] | None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        return stat.st_size, stat.st_mtime_ns, stat.st_ino


def read(path: Path) -> list[Row]:
    """Every whole line; [] without a file. A damaged one, or a missing end, is `{n, act: "damaged", line}`."""
    rows: list[Row] = []
    told = _told(path)  # before the lines: it is written after them
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was never answered
        try:
            rows.append(unseal(json.loads(line), needed=NEEDED))
        except (ValueError, AttributeError):
            rows.append({"n": max([number, *(row["n"] + 1 for row in rows[-1:])]), "act": DAMAGED, "line": number})
    if told > max((row["n"] for row in rows), default=0):
        rows.append({"n": told, "act": DAMAGED, "line": len(lines), "missing": True})
    return rows


def mark_of(path: Path) -> Path:
    """Beside the acts: how many there are."""
    return path.with_suffix(".mark")


def _told(path: Path) -> int:
    try:
        return int((read_sealed(mark_of(path), ["n"], ["n"]) or {"n": 0})["n"])
    except DamagedFileError as damage:
        log.warning("%s; whether acts are missing at the end of %s is not known", damage, path.name)
        return 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else is in here for this folder meanwhile: a version is pinned or pruned, not both. OSError: held."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path) -> None:
    """Take a file's lock, which goes with the descriptor; BlockingIOError when somebody holds it for PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise BlockingIOError(error.errno, f"another process holds {path}; ask again") from None
            time.sleep(0.01)


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        whole = os.pread(descriptor, size, 0).rfind(b"\n") + 1
        log.warning("acts.jsonl: the last line was torn by a kill, before anybody was told of it; it is cut off")
        os.ftruncate(descriptor, whole)


def _sync_or_take_back(descriptor: int, rows: list[Row]) -> None:
    size = sum(len(json.dumps(seal(row)).encode()) + 1 for row in rows)
    try:
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - size)
        raise
