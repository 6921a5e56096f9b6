"""The journal's durable mark: how far everything is synced to disk. The writer stores it, every reader holds to it.

    journal/durable = slot | slot          slot = segment, offset, sequence of the next record, checksum: in turn

A kill in mid-store leaves the other slot, a group older. The file is mapped and not synced with each group, which would
double the price of an acknowledgement: a power cut leaves an older mark, but never a newer one than what is on disk,
because a slot is stored only after everything below it was synced. The one bare word that earlier releases kept (8
bytes, no sequence) is read too, and replaced by the next writer.
"""

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from serl_launcher.run.files import write_whole

SEGMENT_MAGIC = b"FSJRNL01"
FIRST_OFFSET = len(SEGMENT_MAGIC)
MARK_FILE = "durable"
_SLOT = struct.Struct("<QQQI4x")  # segment, offset, sequence, crc32 of these three
_SUMMED = 24  # bytes of a slot in front of its checksum
_OLD_WORD = struct.Struct("<Q")  # segment << 40 | offset
_FILE_BYTES = 2 * _SLOT.size


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place between two records."""

    segment: int = 1  # number in the segment's name, from 1
    offset: int = FIRST_OFFSET  # bytes into the segment


@dataclass(frozen=True, slots=True)
class Mark:
    """Everything in front of `position` is on disk."""

    position: Position = Position()
    sequence: int | None = 0  # of the next record, so the number of records below; None: an earlier release's mark


def read_mark(folder: Path) -> Mark | None:
    """How far the writer has synced; None when the file is missing or holds no mark (damaged, empty, torn)."""
    try:
        raw = (folder / MARK_FILE).read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) == _OLD_WORD.size:
        (word,) = _OLD_WORD.unpack(raw)
        return _mark(word >> 40, word & ((1 << 40) - 1), None)
    return max(_slots(raw), key=lambda found: found[1].position, default=(0, None))[1]


def _slots(raw: bytes) -> list[tuple[int, Mark]]:
    """(number, mark) of each whole slot."""
    whole = []
    for number in range(len(raw) // _SLOT.size if len(raw) == _FILE_BYTES else 0):
        slot = raw[number * _SLOT.size : (number + 1) * _SLOT.size]
        segment, offset, sequence, total = _SLOT.unpack(slot)
        mark = _mark(segment, offset, sequence) if zlib.crc32(slot[:_SUMMED]) == total else None
        if mark is not None:
            whole.append((number, mark))
    return whole


def _mark(segment: int, offset: int, sequence: int | None) -> Mark | None:
    return Mark(Position(segment, offset), sequence) if segment >= 1 and offset >= FIRST_OFFSET else None


def _encode(mark: Mark) -> bytes:
    fields = struct.pack("<QQQ", mark.position.segment, mark.position.offset, mark.sequence or 0)
    return fields + struct.pack("<I4x", zlib.crc32(fields))


def write_mark(folder: Path, mark: Mark) -> None:
    """Put a whole mark file in place, on disk when this returns."""
    write_whole(folder / MARK_FILE, lambda part: part.write_bytes(2 * _encode(mark)), durable=True)


class DurableMark:
    """The one writer's hand on the file. A new file needs room on the disk, a store does not."""

    def __init__(self, folder: Path) -> None:
        path = folder / MARK_FILE
        if not path.exists() or path.stat().st_size != _FILE_BYTES:
            write_mark(folder, read_mark(folder) or Mark())
        slots = _slots(path.read_bytes())
        self._turn = 1 - max(slots, key=lambda found: found[1].position)[0] if slots else 0
        fd = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, _FILE_BYTES)
        finally:
            os.close(fd)

    def begin(self, mark: Mark) -> None:
        """What a writer has synced at its start, in both slots: either may be damaged."""
        self.store(mark)
        self.store(mark)

    def store(self, mark: Mark) -> None:
        """Everything in front of `mark` is synced."""
        start = self._turn * _SLOT.size
        self._map[start : start + _SLOT.size] = _encode(mark)
        self._turn = 1 - self._turn

    def close(self) -> None:
        """Sync the mark and let go of the file."""
        self._map.flush()
        self._map.close()
