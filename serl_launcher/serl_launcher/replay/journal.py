"""Reading the journal: the checksummed segments that hold everything the gateway ever acknowledged.

    journal/000001.seg = segment header | record | record | …        record = header (40 bytes) | payload

Callers: the gateway at its start (recovery), the exporter (follows a growing journal), the checker. `journal_writer`
writes. A torn tail of the newest segment is what a kill leaves and ends the reading; damage anywhere else, or in
front of anything known to have been synced, is corruption and raises JournalCorrupt.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serl_transport.wire.blob import checksum32

SEGMENT_MAGIC = b"FSJRNL01"
RECORD_MAGIC = b"FSR2"
OLD_MAGIC = b"FSR1"  # the same with zlib's CRC-32
# magic, checksum of what follows, payload length, sequence, wall clock (ns), offset synced before this record's group
RECORD_HEADER = struct.Struct("<4sIQQqQ")
FIRST_OFFSET = len(SEGMENT_MAGIC)
_MAGIC_STEM = b"FSR"
MARK_FILE = "durable"
MAX_PAYLOAD = 1 << 32


class JournalCorrupt(RuntimeError):  # noqa: N818
    """A record that was synced to disk cannot be read back; the message names segment and offset."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place between two records."""

    segment: int = 1  # number in the segment's name, from 1
    offset: int = FIRST_OFFSET  # bytes into the segment


@dataclass(frozen=True, slots=True)
class Record:
    """One record as read back."""

    sequence: int  # 0, 1, 2, … over the whole journal
    time_ns: int  # wall clock when the gateway received it
    payload: bytes
    end: Position  # where the next record begins


def segment_path(folder: Path, number: int) -> Path:
    """journal/000001.seg for 1."""
    return folder / f"{number:06d}.seg"


def segment_numbers(folder: Path) -> list[int]:
    """Numbers of the segments on disk, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.seg") if path.stem.isdigit())


def record_header(payload: Sequence[Any], sequence: int, time_ns: int, synced: int) -> bytes:
    """The header of a record whose payload is these buffers, one after the other."""
    tail = struct.pack("<QQqQ", sum(map(len, payload)), sequence, time_ns, synced)
    return RECORD_MAGIC + struct.pack("<I", checksum32([tail, *payload])) + tail


def encode_mark(position: Position) -> bytes:
    """The durable mark: 8 bytes, stored and loaded in one go."""
    return struct.pack("<Q", position.segment << 40 | position.offset)


def read_mark(folder: Path) -> Position | None:
    """How far the writer has synced, or None before the first writer."""
    try:
        raw = (folder / MARK_FILE).read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) != 8:
        return None
    (word,) = struct.unpack("<Q", raw)
    return Position(word >> 40, word & ((1 << 40) - 1))


class JournalReader:
    """Iterates records from a position, again and again as the journal grows.

    follow: read only up to the writer's durable mark, so that no record is seen that the writer may still take back
    (a group that failed to sync). Without it, read to the end of what is on disk.
    """

    def __init__(self, folder: Path, start: Position | None = None, follow: bool = False) -> None:
        self._folder = folder
        self._follow = follow
        self._file: int | None = None
        self._sequence: int | None = None
        self.position = start or Position()

    def poll(self) -> Iterator[Record]:
        """Every record between the position and the end of the journal; the position moves along."""
        limit = read_mark(self._folder) if self._follow else None
        if self._follow and limit is None:
            return
        while True:
            if limit is not None and self.position >= limit:
                return
            record = self._next()
            if record is not None:
                if self._sequence is not None and record.sequence != self._sequence + 1:
                    raise JournalCorrupt(
                        f"{self._where()}: expected record {self._sequence + 1}, found {record.sequence}"
                    )
                self._sequence, self.position = record.sequence, record.end
                yield record
            elif not self._next_segment():
                return

    @property
    def next_sequence(self) -> int:
        """Sequence number of the record that would come next, once the journal was read from its start."""
        return 0 if self._sequence is None else self._sequence + 1

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _where(self) -> str:
        return f"{segment_path(self._folder, self.position.segment)} at byte {self.position.offset}"

    def _next(self) -> Record | None:
        """The record at the position, or None at the (possibly torn) end of the segment."""
        if self._file is None:
            try:
                self._file = os.open(segment_path(self._folder, self.position.segment), os.O_RDONLY)
            except FileNotFoundError:
                return None
            magic = os.pread(self._file, FIRST_OFFSET, 0)
            if len(magic) == FIRST_OFFSET and magic != SEGMENT_MAGIC:
                raise JournalCorrupt(f"{segment_path(self._folder, self.position.segment)} is no journal segment")
        return read_record(self._file, self.position)

    def _next_segment(self) -> bool:
        """Move to the following segment when this one is whole; False at the end of the journal."""
        later = [n for n in segment_numbers(self._folder) if n > self.position.segment]
        file = self._file
        at_end = file is None or os.fstat(file).st_size <= self.position.offset
        if file is not None and not at_end and (later or self._follow or _synced_beyond(file, self.position)):
            raise JournalCorrupt(
                f"{self._where()}: a record that was synced is damaged. Restore the file, or move the run folder aside"
            )
        if not later:
            return False
        self.close()
        self.position = Position(later[0])
        return True


def read_record(file: int, position: Position) -> Record | None:
    """Parse one record; None when what lies there is short, or not a whole and intact record."""
    header = os.pread(file, RECORD_HEADER.size, position.offset)
    if len(header) < RECORD_HEADER.size:
        return None
    magic, total, length, sequence, time_ns, _ = RECORD_HEADER.unpack(header)
    if magic not in (RECORD_MAGIC, OLD_MAGIC) or length > MAX_PAYLOAD:
        return None
    payload = os.pread(file, length, position.offset + RECORD_HEADER.size)
    if len(payload) != length or _sum(magic, header[8:], payload) != total:
        return None
    end = Position(position.segment, position.offset + RECORD_HEADER.size + length)
    return Record(sequence, time_ns, payload, end)


def _synced_beyond(file: int, position: Position) -> bool:
    """Does a later record of this segment testify that the damaged place had been synced?

    Each record names the offset that was synced before its group was written. Without such a witness the damage is
    an unacknowledged tail (a kill or a power cut in mid-group) and may be dropped.
    """
    size = os.fstat(file).st_size
    rest = os.pread(file, size - position.offset, position.offset)
    at = rest.find(_MAGIC_STEM, 1)
    while at >= 0:
        candidate = Position(position.segment, position.offset + at)
        if read_record(file, candidate) is not None:
            synced = RECORD_HEADER.unpack(rest[at : at + RECORD_HEADER.size])[5]
            if synced > position.offset:
                return True
        at = rest.find(_MAGIC_STEM, at + 1)
    return False


def _sum(magic: bytes, head: bytes, payload: bytes) -> int:
    return checksum32([head, payload]) if magic == RECORD_MAGIC else zlib.crc32(payload, zlib.crc32(head))
