"""Writing the journal: a thread that turns queued payloads into synced records, many per fdatasync (group commit).

    gateway loop ── append(payload, done) ─▶ queue ─▶ [ check │ write group │ fdatasync │ mark ] ─▶ post(done) ─▶ loop

`done` runs on the gateway's loop after the payload is on disk (or with StorageFull when it is not), in journal order.
`check`, where one is given, runs on the thread first: what the loop has no time for. What it refuses is not written.
The queue is bounded by the actors' windows of unacknowledged items; the thread blocks on it and on the disk alone.
A group that fails is cut off the file again, so that what follows a full disk is a valid journal.
"""

import contextlib
import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from serl_config.clock import steady_time_ns
from serl_launcher.replay.durable import SEGMENT_MAGIC, DurableMark, Mark, Position
from serl_launcher.replay.journal import JournalReader, record_header, segment_path
from serl_launcher.run.files import FULL, sync
from serl_transport.contract.errors import StorageFull, WireError
from serl_transport.wire.blob import write_buffers

log = logging.getLogger("gateway")
GROUP_BYTES = 64 << 20
PID_BYTES = 16
SLOW_S = 2.0  # a write and sync that took longer is reported
Done = Callable[[WireError | None, int], None]  # (error or None, the record's wall clock in ns)
Check = Callable[[], object]  # raises WireError for a payload that must not be written
Item = tuple[Sequence[Any], Done, Check | None]


class RunFolderBusyError(RuntimeError):
    """Another gateway serves this run folder."""


class JournalLock:
    """One gateway per run folder; the kernel drops the lock when the process dies, however it dies."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "lock"
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._fd, PID_BYTES, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise RunFolderBusyError(
                f"a gateway (pid {owner}) already serves {folder.parent}: "
                "stop it, or start this run under another name (run=…)"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its owner's name is missing
            os.pwrite(self._fd, f"{os.getpid():<{PID_BYTES}}".encode(), 0)

    def release(self) -> None:
        """Let the next gateway in."""
        os.close(self._fd)


class JournalWriter:
    """Appends records behind `reader`, which must have read the whole journal (recovery does); a torn tail is cut off.

    post: runs a callable on the caller's loop, safe from this thread. segment_bytes: a segment this long is closed.
    first: the record that opens an empty journal. Raises StorageFull when the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        reader: JournalReader,
        post: Callable[[Callable[[], None]], None],
        segment_bytes: int,
        first: bytes | None = None,
    ) -> None:
        self._folder = folder
        self._post = post
        self._segment_bytes = segment_bytes
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._sequence = reader.next_sequence
        self._end = reader.position
        self._file: int | None = None
        try:
            self._mark = DurableMark(folder)
            # Cut a torn tail, and sync what a killed writer left unsynced: from now on it counts as taken.
            self._open_segment()
            self._mark.begin(self._synced)
            for above in (folder.parent, folder.parent.parent):  # or a power cut takes a new run's folder with it
                with contextlib.suppress(PermissionError):
                    sync(above)
            if first is not None and self._sequence == 0:
                self._write_group([[first]], steady_time_ns())
        except OSError as failure:
            raise StorageFull(_explain(failure, folder)) from None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Does the thread run?"""
        return self._thread.is_alive()

    def append(self, payload: bytes | Sequence[Any], done: Done, check: Check | None = None) -> None:
        """Queue one record: bytes, or flat buffers that are written one after the other without being joined."""
        parts = [payload] if isinstance(payload, bytes) else payload
        self._queue.put((parts, done, check))

    def close(self) -> None:
        """Write and sync what is queued, then stop. Callbacks are still posted."""
        self._queue.put(None)
        self._thread.join()
        if self._file is not None:
            os.close(self._file)
        with contextlib.suppress(OSError):  # a disk that takes no more: the mark that is on it is older, never wrong
            self._mark.close()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            group = self._take_group()
            stopping = group[-1] is None
            items = [item for item in group if item is not None]
            if items:
                self._commit(items)

    def _take_group(self) -> list[Item | None]:
        """Block for one item, then take what else is there; a None ends it and means stop."""
        item = self._queue.get()
        group, size = [item], 0
        while item is not None and size < GROUP_BYTES:
            size += sum(map(len, item[0]))
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            group.append(item)
        return group

    def _commit(self, group: list[Item]) -> None:
        now, checked = steady_time_ns(), []
        for payload, done, check in group:
            try:
                if check is not None:
                    check()
                checked.append((payload, done))
            except WireError as refusal:
                self._post(partial(done, refusal, now))
        error = self._written([payload for payload, _ in checked], now) if checked else None
        for _, done in checked:  # one call each: a callback that fails must not take the others with it
            self._post(partial(done, error, now))

    def _written(self, payloads: list[Sequence[Any]], now: int) -> StorageFull | None:
        """Write the group; why it could not be."""
        try:
            self._write_group(payloads, now)
        except OSError as failure:
            return StorageFull(_explain(failure, self._folder))
        return None

    def _write_group(self, payloads: list[Sequence[Any]], now: int) -> None:
        file = self._writable_segment()
        synced = self._end.offset
        buffers: list[Any] = []
        for i, parts in enumerate(payloads):
            buffers += [record_header(parts, self._sequence + i, now, synced), *parts]
        try:
            started = time.monotonic()
            written = write_buffers(file, buffers, synced)
            os.fdatasync(file)
            if (took := time.monotonic() - started) > SLOW_S:
                log.warning("the disk took %.1f s to keep %d bytes: acknowledgements wait for it", took, written)
        except OSError:
            self._cut_back(file)
            raise
        self._sequence += len(payloads)
        self._end = Position(self._end.segment, synced + written)
        self._mark.store(self._synced)

    @property
    def _synced(self) -> Mark:
        return Mark(self._end, self._sequence)

    def _cut_back(self, file: int) -> None:
        """Remove a group that was not synced. If even that fails, the next group opens the segment anew and retries."""
        try:
            os.ftruncate(file, self._end.offset)
        except OSError:
            os.close(file)
            self._file = None

    def _writable_segment(self) -> int:
        """The open segment, ending exactly at `_end`; a new one when the last is full."""
        if self._file is not None and self._end.offset >= self._segment_bytes:
            os.close(self._file)
            self._file = None
        if self._file is None:
            if self._end.offset >= self._segment_bytes:
                self._end = Position(self._end.segment + 1)
            self._open_segment()
        assert self._file is not None
        return self._file

    def _open_segment(self) -> None:
        """Open the segment of `_end`, cut off what lies behind it, and sync what lies in front."""
        path = segment_path(self._folder, self._end.segment)
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            if (torn := os.fstat(file).st_size - self._end.offset) > 0:
                log.info("%s: cut off a torn tail of %d bytes that was never acknowledged", path, torn)
            os.ftruncate(file, self._end.offset)
            write_buffers(file, [SEGMENT_MAGIC], 0)
            os.fsync(file)
            sync(self._folder)
        except OSError:
            os.close(file)
            raise
        self._file = file


def _explain(failure: OSError, folder: Path) -> str:
    full = failure.errno in FULL
    what = "the learner's disk is full" if full else f"the learner cannot write ({failure.strerror})"
    return f"{what} at {folder}: free space or make it writable; unacknowledged items stay in the actor's spool"
