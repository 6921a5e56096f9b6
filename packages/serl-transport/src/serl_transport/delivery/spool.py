"""What an actor produced and the learner has not yet acknowledged, kept on the actor's own disk.

The client appends every item before it is sent, and forgets it only when the learner has acknowledged it, so that
`kill -9` of the actor, a dead learner and a cut link lose nothing. Items of earlier boots of the same
`unique_identifier` are found on the next start and sent first.

    append ─▶ [000003.seg | 000004.seg | 000005.seg ◀ appends]  ─▶ read ─▶ learner
                 │ all acknowledged: file deleted                              │
                 └──────────────── ack (watermark in the segment's head) ◀─────┘

Bound: `max_bytes` of segment files; when it is reached `append` raises SpoolFull, and acknowledgements unblock it.
"""

import fcntl
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from serl_transport.contract.errors import SpoolBusy, SpoolError, SpoolFull
from serl_transport.contract.specs import new_boot_id
from serl_transport.delivery.segment import HEAD_BYTES, Segment, record_bytes
from serl_transport.wire.blob import join, join_parts, split
from serl_transport.wire.codec import Frames, buffer_of, nbytes

log = logging.getLogger(__name__)

DEFAULT_BYTES = 2 << 30


class ItemKey(NamedTuple):
    """Names one item of one actor for ever."""

    boot_id: str  # the actor process that made it; later boots sort after earlier ones
    seq: int  # 1, 2, 3 ... within the boot


class Spool(ABC):
    """An ordered set of unacknowledged items. Thread-safe: one thread appends, another reads and acknowledges."""

    boot_id: str  # under which `append` numbers items
    session: str  # names the spool over all its boots: two living processes never share it

    @abstractmethod
    def append(self, item: Frames) -> int:
        """Keep a copy of these frames and return the item's seq. Raises SpoolFull when it does not fit."""

    @abstractmethod
    def pending(self) -> list[ItemKey]:
        """Keys of the unacknowledged items, oldest boot first, each boot in order."""

    @abstractmethod
    def read(self, key: ItemKey) -> Frames:
        """The item's frames. KeyError when it is not pending, SpoolError when the disk returns other bytes."""

    @abstractmethod
    def ack(self, key: ItemKey) -> bool:
        """Forget an item that the learner holds; False when it was not pending (acknowledged twice)."""

    @abstractmethod
    def refuse(self, key: ItemKey, reason: str) -> str:
        """Set aside an item that the learner will never take; returns where it went, for the log."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of unacknowledged items."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in use."""

    @abstractmethod
    def close(self) -> None:
        """Release files and the lock; pending items stay on disk."""


class MemorySpool(Spool):
    """The same without a folder: survives a cut link and a learner restart, not the death of this process."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.boot_id = self.session = new_boot_id()
        self._max_bytes = max_bytes
        self._items: OrderedDict[ItemKey, Frames] = OrderedDict()
        self._nbytes = 0
        self._last_seq = 0
        self._lock = threading.Lock()

    def append(self, item: Frames) -> int:
        size = sum(map(nbytes, item))
        if self._nbytes + size > self._max_bytes:
            raise SpoolFull(_full_message("memory", len(self._items), self._nbytes, self._max_bytes))
        kept = [bytes(buffer_of(frame)) for frame in item]
        with self._lock:
            self._last_seq += 1
            self._items[ItemKey(self.boot_id, self._last_seq)] = kept
            self._nbytes += size
            return self._last_seq

    def pending(self) -> list[ItemKey]:
        with self._lock:
            return list(self._items)

    def read(self, key: ItemKey) -> Frames:
        with self._lock:
            return self._items[key]

    def ack(self, key: ItemKey) -> bool:
        with self._lock:
            item = self._items.pop(key, None)
            self._nbytes -= sum(map(nbytes, item or ()))
            return item is not None

    def refuse(self, key: ItemKey, reason: str) -> str:
        self.ack(key)
        return "dropped"

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def close(self) -> None:
        pass


class DiskSpool(Spool):
    """The spool in a folder that one live process may hold at a time."""

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_BYTES):
        """Open or create; SpoolBusy when another process holds it, SpoolError when the folder cannot be written."""
        self.boot_id = new_boot_id()
        self.folder = Path(folder)
        self._max_bytes = max_bytes
        self._segment_bytes = max(HEAD_BYTES + 1, min(64 << 20, max_bytes // 8))
        self._lock = threading.Lock()
        self._last_seq = 0
        self._lock_fd = _lock_folder(self.folder)
        self.session = _session_of(self.folder) or self.boot_id
        try:
            self._segments = self._recover()
        except BaseException:
            os.close(self._lock_fd)
            raise
        # What earlier boots left is sent first, also when the clock was set back since.
        self.boot_id = new_boot_id(after=max((segment.boot_id for segment in self._segments), default=self.boot_id))
        self._number = max((segment.number for segment in self._segments), default=0)
        self._current: Segment | None = None
        self._count = sum(len(segment.pending) for segment in self._segments)

    def append(self, item: Frames) -> int:
        blob = join_parts(item)
        size = record_bytes(blob)
        with self._lock:
            self._make_room(size)
            try:
                if self._current is None:
                    self._current = self._new_segment()
                self._current.append(self._last_seq + 1, blob)
            except OSError as error:
                # ENOSPC and the like: nothing was kept, the segment cut the partial record off again
                raise SpoolFull(f"cannot write to the spool {self.folder}: {error.strerror}") from None
            self._last_seq += 1
            self._count += 1
            return self._last_seq

    def pending(self) -> list[ItemKey]:
        with self._lock:
            return [ItemKey(segment.boot_id, seq) for segment in self._segments for seq in segment.pending]

    def read(self, key: ItemKey) -> Frames:
        with self._lock:
            item = self._find(key).read(key.seq)
        return split(item)

    def ack(self, key: ItemKey) -> bool:
        with self._lock:
            try:
                segment = self._find(key)
            except KeyError:
                return False
            segment.ack(key.seq)
            self._count -= 1
            if not segment.pending and segment is not self._current:
                self._drop(segment)
            return True

    def refuse(self, key: ItemKey, reason: str) -> str:
        item = self.read(key)
        aside = self.folder / "refused"
        aside.mkdir(exist_ok=True)
        path = aside / f"{key.boot_id}-{key.seq:08d}.item"
        path.with_suffix(".txt").write_text(reason + "\n")
        path.write_bytes(join(item))
        self.ack(key)
        return f"moved to {path}"

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(segment.size for segment in self._segments)

    def close(self) -> None:
        with self._lock:
            for segment in self._segments:
                if segment.pending:
                    segment.close()
                else:
                    segment.delete()
            self._segments, self._current = [], None
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    def _recover(self) -> list[Segment]:
        """The segments that earlier boots left with unacknowledged items, oldest first; emptied ones are deleted."""
        kept = []
        for path in sorted(self.folder.glob("*.seg")):
            segment = Segment.open(path)
            if segment is None:
                log.warning("%s was removed: its head is torn, and nothing whole is in it", path)
            if segment is None or not segment.pending:
                path.unlink()
                if segment is not None:
                    segment.close()
                continue
            kept.append(segment)
        return kept

    def _new_segment(self) -> Segment:
        self._number += 1
        segment = Segment.create(self.folder / f"{self._number:06d}.seg", self.boot_id)
        self._segments.append(segment)
        return segment

    def _make_room(self, size: int) -> None:
        """Start a new segment when the current one has its size; raise SpoolFull when the folder has its size."""
        current = self._current
        if current is not None:
            used = sum(segment.size for segment in self._segments)
            roomy = current.size + size <= self._segment_bytes
            if not roomy or (not current.pending and used + size > self._max_bytes):
                self._current = None
                if not current.pending:
                    self._drop(current)
        used = sum(segment.size for segment in self._segments) + (HEAD_BYTES if self._current is None else 0)
        if used + size > self._max_bytes:
            raise SpoolFull(_full_message(str(self.folder), self._count, used, self._max_bytes))

    def _find(self, key: ItemKey) -> Segment:
        for segment in self._segments:
            if segment.boot_id == key.boot_id and key.seq in segment.pending:
                return segment
        raise KeyError(key)

    def _drop(self, segment: Segment) -> None:
        self._segments.remove(segment)
        segment.delete()


def open_spool(folder: str | Path | None, max_bytes: int = DEFAULT_BYTES) -> Spool:
    """A disk spool in `folder`, or one in memory without a folder."""
    return MemorySpool(max_bytes) if folder is None else DiskSpool(folder, max_bytes)


def _session_of(folder: Path) -> str | None:
    """The folder's own name for itself, made once; None when the disk takes nothing (then a restart waits a little)."""
    path, part = folder / "session", folder / "session.part"
    try:
        if not path.exists():
            with part.open("w") as file:
                file.write(new_boot_id())
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        return path.read_text().strip()[:64] or None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("the spool %s keeps no session name: %s", folder, error)
        return None


def _full_message(where: str, items: int, used: int, bound: int) -> str:
    return (
        f"the spool ({where}) is full: {items} items that the learner has not acknowledged, "
        f"{used / 1e6:.1f} of {bound / 1e6:.1f} MB; start the learner or give more room with spool_bytes="
    )


def _lock_folder(folder: Path) -> int:
    """Take the folder for this process; the kernel releases the lock when the process dies, however it dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise SpoolError(
            f"cannot write the spool folder {folder}: {error.filename}: {error.strerror}; give another spool_dir="
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise SpoolBusy(
            f"the spool {folder} is in use by process {holder}: two actors must not share a name; "
            "give this one another unique_identifier="
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor
