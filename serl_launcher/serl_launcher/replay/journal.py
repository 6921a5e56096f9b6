"""Reading the journal: the checksummed segments that hold everything the gateway ever acknowledged.

    journal/000001.seg = segment header | record | record | …        record = header (40 bytes) | payload
    journal/durable    = how far all of it is synced (durable.py)

Callers: the gateway at its start (recovery), the exporter (follows a growing journal), the checker. `journal_writer`
writes, `salvage` reads what damage has left. What is missing or damaged below the durable mark, or in front of anything
known to have been synced, raises JournalCorrupt. A torn tail behind the mark is what a kill leaves: the reading ends.
"""

import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serl_launcher.replay.durable import FIRST_OFFSET, MARK_FILE, SEGMENT_MAGIC, Mark, Position, read_mark
from serl_transport.wire.blob import checksum32

log = logging.getLogger("journal")
RECORD_MAGIC = b"FSR2"
OLD_MAGIC = b"FSR1"  # the same with zlib's CRC-32
# magic, checksum of what follows, payload length, sequence, wall clock (ns), offset synced before this record's group
RECORD_HEADER = struct.Struct("<4sIQQqQ")
_MAGIC_STEM = b"FSR"
_SEARCH_BYTES = 4 << 20  # read at once when the next whole record is looked for


class JournalCorrupt(RuntimeError):  # noqa: N818
    """What was synced to disk cannot be read back; the message names place, extent and what to do, in one line."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as read back."""

    sequence: int  # 0, 1, 2, … over the whole journal
    time_ns: int  # wall clock when the gateway received it
    synced: int  # offset in its segment that was synced before this record's group was written
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


class JournalReader:
    """Iterates records from a position, again and again as the journal grows.

    follow: read only up to the writer's durable mark, so that no record is seen that the writer may still take back
    (a group that failed to sync). Without it, read to the end of what is on disk. May be changed between two records.
    """

    def __init__(self, folder: Path, start: Position | None = None, follow: bool = False) -> None:
        self._folder = folder
        self._file: int | None = None
        self._sequence: int | None = -1 if start is None else None  # of the last record; None: not known
        self._told = False
        self.follow = follow
        self.position = start or Position()

    def poll(self) -> Iterator[Record]:
        """Every record between the position and the end of the journal; the position moves along. JournalCorrupt."""
        mark = read_mark(self._folder)  # before the records: a living writer only adds behind it
        if mark is None:
            self._tell_no_mark()
            if self.follow:
                return
        while not (self.follow and mark is not None and self.position >= mark.position):
            record = self._next(mark)
            if record is not None:
                if self._sequence is not None and record.sequence != self.next_sequence:
                    raise self._corrupt(f"expected record {self.next_sequence}, found {record.sequence}", mark)
                self._sequence, self.position = record.sequence, record.end
                yield record
            elif not self._next_segment(mark):
                return

    @property
    def next_sequence(self) -> int:
        """Sequence number of the record that would come next, once the journal was read from its start."""
        return 0 if self._sequence is None else self._sequence + 1

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _next(self, mark: Mark | None) -> Record | None:
        """The record at the position, or None at the (possibly torn) end of the segment."""
        path = segment_path(self._folder, self.position.segment)
        if self._file is None:
            try:
                self._file = os.open(path, os.O_RDONLY)
                magic = os.pread(self._file, FIRST_OFFSET, 0)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise self._corrupt(f"{path} cannot be read: {error.strerror}", mark) from None
            # A header alone that is torn: power was cut while the segment was made.
            if magic != SEGMENT_MAGIC and os.fstat(self._file).st_size > FIRST_OFFSET:
                raise self._corrupt(f"{path} is no journal segment", mark)
        return read_record(self._file, self.position)

    def _next_segment(self, mark: Mark | None) -> bool:
        """Move on where the segment has no further record; False at the end of the journal."""
        later = [n for n in segment_numbers(self._folder) if n > self.position.segment]
        below = mark is None or self.position < mark.position
        if self._unread and (below or later or _synced_beyond(self._file, self.position)):
            if read_record(self._file, self.position) is not None:
                return True  # a living writer has completed it meanwhile
            raise self._corrupt("what was synced is damaged", mark)
        if later:
            if self._file is None or later[0] != self.position.segment + 1:
                gone = self.position.segment + (self._file is not None)
                raise self._corrupt(f"{segment_path(self._folder, gone)} is missing", mark)
            self.close()
            self.position = Position(later[0])
            return True
        if mark is not None and self._ends_before(mark):
            raise self._corrupt("the journal ends before its durable mark", mark)
        return False

    @property
    def _unread(self) -> bool:
        """Are there bytes behind the position in its segment?"""
        return self._file is not None and os.fstat(self._file).st_size > self.position.offset

    def _ends_before(self, mark: Mark) -> bool:
        if self.position < mark.position:
            return True
        return mark.sequence is not None and self._sequence is not None and self.next_sequence < mark.sequence

    def _tell_no_mark(self) -> None:
        if not self._told and segment_numbers(self._folder):
            self._told = True
            log.warning(
                "%s is missing or damaged: whether acknowledged records are missing at the journal's end cannot be "
                "told; the next gateway writes it anew",
                self._folder / MARK_FILE,
            )

    def _corrupt(self, what: str, mark: Mark | None) -> JournalCorrupt:
        where = f"{segment_path(self._folder, self.position.segment)} at byte {self.position.offset}"
        return JournalCorrupt(
            f"{where}: {what}. {self._lost(mark)}{_said(mark)}. {how_to_recover(self._folder.parent)}"
        )

    def _lost(self, mark: Mark | None) -> str:
        """How much cannot be read here, as far as it can be known."""
        found = next_record(self._folder, self.position, self.next_sequence)
        start = self.position
        if found is None and mark is None:
            return "No whole record follows. "
        if found is not None:
            end, sequence = found[0], found[1].sequence
        else:
            assert mark is not None
            end, sequence = mark.position, mark.sequence
        parts = [f"up to segment {end.segment} byte {end.offset}"]
        if end.segment == start.segment:
            parts.append(f"{max(0, end.offset - start.offset)} bytes")
        if sequence is not None and self._sequence is not None:
            parts.append(_count(max(0, sequence - self.next_sequence)))
        return f"Missing from there: {', '.join(parts)}. "


def how_to_recover(run_dir: Path) -> str:
    """The end of each message about a damaged journal."""
    return (
        "Nothing was changed; what is readable is copied into a new run by: "
        f".venv/bin/python tools/recover_run.py {run_dir}"
    )


def _said(mark: Mark | None) -> str:
    if mark is None:
        return f"{MARK_FILE} is missing or damaged, so it may have been acknowledged"
    records = "" if mark.sequence is None else f", {_count(mark.sequence)},"
    position = mark.position
    return f"By {MARK_FILE}, all up to segment {position.segment} byte {position.offset}{records} was acknowledged"


def _count(records: int) -> str:
    return "1 record" if records == 1 else f"{records} records"


def read_record(file: int, position: Position) -> Record | None:
    """Parse one record; None when what lies there is short, or not a whole and intact record."""
    header = os.pread(file, RECORD_HEADER.size, position.offset)
    if len(header) < RECORD_HEADER.size:
        return None
    magic, total, length, sequence, time_ns, synced = RECORD_HEADER.unpack(header)
    start = position.offset + RECORD_HEADER.size
    if magic not in (RECORD_MAGIC, OLD_MAGIC) or length > os.fstat(file).st_size - start:
        return None
    payload = os.pread(file, length, start)
    if len(payload) != length or _sum(magic, header[8:], payload) != total:
        return None
    return Record(sequence, time_ns, synced, payload, Position(position.segment, start + length))


def next_record(folder: Path, start: Position, sequence: int) -> tuple[Position, Record] | None:
    """The first whole record at or behind `start`, in its segment or a later one, that is not older than `sequence`."""
    for number in segment_numbers(folder):
        if number < start.segment or not segment_path(folder, number).is_file():
            continue
        file = os.open(segment_path(folder, number), os.O_RDONLY)
        try:
            offset = start.offset if number == start.segment else FIRST_OFFSET
            for position, record in whole_records(file, Position(number, offset)):
                if record.sequence >= sequence:
                    return position, record
        finally:
            os.close(file)
    return None


def whole_records(file: int, start: Position) -> Iterator[tuple[Position, Record]]:
    """Every place of a segment at or behind `start` where a whole record lies, whatever lies between them."""
    size, at = os.fstat(file).st_size, start.offset
    while at < size:
        block = os.pread(file, _SEARCH_BYTES, at)
        next_at = at + max(1, len(block) - len(_MAGIC_STEM) + 1)
        found = block.find(_MAGIC_STEM)
        while found >= 0:
            position = Position(start.segment, at + found)
            record = read_record(file, position)
            if record is not None:
                yield position, record
                next_at = max(next_at, record.end.offset)
            found = block.find(_MAGIC_STEM, found + 1 if record is None else record.end.offset - at)
        at = next_at


def _synced_beyond(file: int | None, position: Position) -> bool:
    """Does a later record of this segment testify that the damaged place had been synced?

    Each record names the offset that was synced before its group was written. It speaks where the mark is older than
    the truth; without such a witness the damage is an unacknowledged tail (a kill or a power cut in mid-group).
    """
    assert file is not None
    return any(record.synced > position.offset for _, record in whole_records(file, position))


def _sum(magic: bytes, head: bytes, payload: bytes) -> int:
    return checksum32([head, payload]) if magic == RECORD_MAGIC else zlib.crc32(payload, zlib.crc32(head))
