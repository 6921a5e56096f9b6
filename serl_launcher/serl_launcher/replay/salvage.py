"""What damage has left of a journal: its whole records in order, and where some are missing.

    Salvage.records ─▶ record | record | …   then .holes ─▶ tools/recover_run.py ─▶ write_journal: a whole journal anew

Reading goes on at the next whole record wherever one cannot be read. Nothing of the damaged journal is changed.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from serl_launcher.replay.durable import FIRST_OFFSET, SEGMENT_MAGIC, Mark, Position, read_mark, write_mark
from serl_launcher.replay.journal import Record, record_header, segment_numbers, segment_path, whole_records


@dataclass(frozen=True, slots=True)
class Hole:
    """Records that were acknowledged, as far as is known, and cannot be read."""

    start: Position  # where the last readable record ends
    end: Position  # where the next one begins, or the journal's end by its mark
    records: int | None  # how many were there; None: nothing tells

    def __str__(self) -> str:
        count = {None: "nobody knows how many records", 1: "1 record"}.get(self.records, f"{self.records} records")
        start, end = self.start, self.end
        if start.segment == end.segment:
            extent = f"bytes {start.offset} to {end.offset} ({end.offset - start.offset} bytes)"
        else:
            extent = f"from byte {start.offset} to {segment_path(Path(), end.segment)} byte {end.offset}"
        return f"{segment_path(Path(), start.segment)} {extent}: {count}"


class Salvage:
    """One pass over a damaged (or whole) journal. After `records` has ended, the other attributes hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.mark = read_mark(folder)
        self.holes: list[Hole] = []
        self.torn_bytes = 0  # behind the mark: a group that was never acknowledged

    def records(self) -> Iterator[Record]:
        """Every whole record in the order of its sequence; an older one that lies behind a newer is passed over."""
        at, expected = Position(), 0
        for position, record in self._everything():
            if record.sequence < expected:
                continue
            if record.sequence > expected:
                self.holes.append(Hole(at, position, record.sequence - expected))
            at, expected = record.end, record.sequence + 1
            yield record
        self._judge_end(at, expected)

    def _everything(self) -> Iterator[tuple[Position, Record]]:
        for number in segment_numbers(self._folder):
            file = os.open(segment_path(self._folder, number), os.O_RDONLY)
            try:
                yield from whole_records(file, Position(number))
            finally:
                os.close(file)

    def _judge_end(self, at: Position, expected: int) -> None:
        mark, end = self.mark, self._end_of_files(at)
        if mark is not None and (mark.position > at or (mark.sequence or 0) > expected):
            missing = None if mark.sequence is None else max(0, mark.sequence - expected)
            self.holes.append(Hole(at, max(at, mark.position), missing))
        elif mark is None and end > at:
            self.holes.append(Hole(at, end, None))
        else:
            self.torn_bytes = max(0, end.offset - at.offset) if end.segment == at.segment else 0

    def _end_of_files(self, at: Position) -> Position:
        """The last byte on disk; a segment that holds no record and no byte behind its head counts as none."""
        sizes = {n: segment_path(self._folder, n).stat().st_size for n in segment_numbers(self._folder)}
        return max([at, *(Position(n, size) for n, size in sizes.items() if size > FIRST_OFFSET)])


def write_journal(folder: Path, records: Iterable[tuple[bytes, int]], segment_bytes: int) -> int:
    """A whole journal of (payload, time_ns), numbered from 0, synced when this returns; the number of records."""
    folder.mkdir(parents=True)
    count, end = 0, Position()
    file = _new_segment(folder, end)
    try:
        for payload, time_ns in records:
            if end.offset >= segment_bytes:
                _sync_and_close(file)
                end = Position(end.segment + 1)
                file = _new_segment(folder, end)
            # What lies in front of it is synced before the folder gets its name, and so before anyone reads it.
            header = record_header([payload], count, time_ns, end.offset)
            file.write(header)
            file.write(payload)
            end, count = Position(end.segment, end.offset + len(header) + len(payload)), count + 1
    finally:
        _sync_and_close(file)
    write_mark(folder, Mark(end, count))
    return count


def _new_segment(folder: Path, end: Position) -> BinaryIO:
    file = segment_path(folder, end.segment).open("xb")
    file.write(SEGMENT_MAGIC)
    return file


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())
