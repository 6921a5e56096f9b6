"""A copy of another host's journal: the same segments with the same bytes, so that whoever reads a journal reads it.

    gateway's journal ── bytes behind (segment, offset) ─▶ JournalCopy.take ─▶ segment file ─▶ whole records ─▶ mark
                                                                └ damaged: cut off, and asked for again

Owned by the follower of a host beyond the first. Bytes come as they lie in a segment, cut anywhere; the durable mark
moves over records whose checksum and number are right, so a reader that follows it sees no other. Whatever is damaged,
torn or missing in a copy is cut off at its start and fetched anew: nothing was ever acknowledged by it.
"""

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.replay.durable import FIRST_OFFSET, MARK_FILE, SEGMENT_MAGIC, DurableMark, Mark, Position
from serl_launcher.replay.journal import (
    OLD_MAGIC,
    RECORD_HEADER,
    RECORD_MAGIC,
    JournalCorrupt,
    JournalReader,
    Record,
    read_record,
    segment_numbers,
    segment_path,
)
from serl_launcher.run.alive import beat
from serl_launcher.run.files import sync
from serl_transport.wire.blob import write_buffers

log = logging.getLogger("follower")


@dataclass(frozen=True, slots=True)
class Witness:
    """The last record of a copy, by which the gateway knows that the copy is one of its own journal."""

    at: Position  # where it begins
    header: bytes  # its 40 bytes: checksum, length, number and time among them


class DamagedInTransitError(RuntimeError):
    """What came is no whole record; it was cut off again."""


class JournalCopy:
    """The one writer of a copied journal. Construction reads what is there and cuts off what is not whole. OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        reader, last = JournalReader(folder), None
        try:
            for record in reader.poll():
                last = record
                beat()
        except JournalCorrupt as damage:
            log.warning("the copy of the journal is damaged and fetched anew from there on: %s", damage)
        finally:
            reader.close()
        self._end, self._sequence = reader.position, reader.next_sequence
        self.witness = None if last is None else self._witness(last)
        for number in segment_numbers(folder):
            if number > self._end.segment:
                segment_path(folder, number).unlink()
        self._file = self._open()
        if not (folder / MARK_FILE).is_file():
            (folder / MARK_FILE).unlink(missing_ok=True)
        self._mark = DurableMark(folder)
        self._mark.begin(self.mark)
        self.received = self._end.offset  # bytes of the segment that are here, checked or not

    @property
    def mark(self) -> Mark:
        """Up to where the copy is whole, and how many records that is."""
        return Mark(self._end, self._sequence)

    def take(self, at: Position, data: Any, until: int, ends: bool) -> int:
        """Bytes of the gateway's segment from `at` on; how many records they completed.

        until: the offset up to which the gateway has synced this segment; ends: it is not the last one. An answer to
        an earlier question is passed over. DamagedInTransitError, OSError: nothing of it was taken.
        """
        if at != Position(self._end.segment, self.received):
            return 0
        before = self._sequence
        self.received += write_buffers(self._file, [np.ascontiguousarray(data, np.uint8).data], at.offset)
        last = self._check()
        if self._sequence > before:
            os.fdatasync(self._file)
            self._mark.store(self.mark)
            assert last is not None
            self.witness = self._witness(last)
        if self._end.offset < self.received and (self._is_complete() or self.received >= until):
            self.cut_back()
            raise DamagedInTransitError(
                f"record {self._sequence} of the gateway's journal (segment {self._end.segment} byte "
                f"{self._end.offset}) came damaged"
            )
        if ends and self._end.offset == until:
            self._next_segment()
        return self._sequence - before

    def cut_back(self) -> None:
        """Forget what is no whole record yet."""
        os.ftruncate(self._file, self._end.offset)
        self.received = self._end.offset

    def close(self) -> None:
        os.close(self._file)
        with contextlib.suppress(OSError):  # a full disk: the mark that is on it is older, never wrong
            self._mark.close()

    def _check(self) -> Record | None:
        """Move over the whole records that are here; the last of them."""
        last = None
        while (record := read_record(self._file, self._end)) is not None and record.sequence == self._sequence:
            last, self._end, self._sequence = record, record.end, self._sequence + 1
        return last

    def _is_complete(self) -> bool:
        """Would the record behind the end be all here by its own length? Then it is damaged, since it was not taken."""
        header = os.pread(self._file, RECORD_HEADER.size, self._end.offset)
        if len(header) < RECORD_HEADER.size:
            return False
        magic, _, length, *_ = RECORD_HEADER.unpack(header)
        whole = self._end.offset + RECORD_HEADER.size + length
        return magic not in (RECORD_MAGIC, OLD_MAGIC) or whole <= self.received

    def _next_segment(self) -> None:
        os.close(self._file)
        self._end = Position(self._end.segment + 1)
        self._file = self._open()
        self.received = self._end.offset
        self._mark.store(self.mark)

    def _open(self) -> int:
        """The segment of the end, without what lies behind it."""
        file = os.open(segment_path(self._folder, self._end.segment), os.O_CREAT | os.O_RDWR, 0o644)
        os.ftruncate(file, self._end.offset)
        write_buffers(file, [SEGMENT_MAGIC], 0)
        assert self._end.offset >= FIRST_OFFSET
        os.fsync(file)
        sync(self._folder)
        return file

    def _witness(self, record: Record) -> Witness:
        at = Position(record.end.segment, record.end.offset - len(record.payload) - RECORD_HEADER.size)
        file = os.open(segment_path(self._folder, at.segment), os.O_RDONLY)
        try:
            return Witness(at, os.pread(file, RECORD_HEADER.size, at.offset))
        finally:
            os.close(file)
