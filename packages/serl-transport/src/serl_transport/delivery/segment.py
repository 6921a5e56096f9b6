"""One file of a spool: the items of one boot, each with its checksum, and how far they are acknowledged.

    head: magic, boot id, watermark (every seq up to it is acknowledged), its CRC, the CRC of magic and boot id
    record: length u32, checksum u32 of (seq, length, item), seq u64, item ...

A process killed in mid-append leaves a torn tail, which `open` cuts off. A damaged record between whole ones is passed
over, and named. The watermark is one small write in place; a stale one only means that an item is sent again, and
deduplicated by the learner.
"""

import logging
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serl_transport.contract.errors import SpoolError
from serl_transport.wire.blob import checksum32, write_buffers

log = logging.getLogger(__name__)

_MAGIC = b"SERLSP02"
_OLD_MAGIC = b"SERLSP01"  # its records are summed by zlib's CRC-32
_HEAD = struct.Struct("<8s64s")
_MARK = struct.Struct("<QII")
_RECORD = struct.Struct("<IIQ")
HEAD_BYTES = _HEAD.size + _MARK.size


def record_bytes(item: Sequence[Any]) -> int:
    """Bytes that an item, given as flat buffers, takes in a segment."""
    return _RECORD.size + sum(map(len, item))


class Segment:
    """Owns one segment file. `pending` maps each unacknowledged seq to (offset, length) of its record."""

    def __init__(self, path: Path, descriptor: int, boot_id: str, head_crc: int):
        self.path = path
        self.number = int(path.stem)
        self.boot_id = boot_id
        self.size = HEAD_BYTES
        self.pending: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._fd = descriptor
        self._head_crc = head_crc  # 0: of an older release
        self._sum: Callable[[Sequence[Any]], int] = checksum32
        self._last_seq = 0
        self._watermark = 0

    @classmethod
    def create(cls, path: Path, boot_id: str) -> "Segment":
        """A new, empty segment."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            head = _HEAD.pack(_MAGIC, boot_id.encode())
            os.pwrite(descriptor, head + _mark(0, zlib.crc32(head)), 0)
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
        return cls(path, descriptor, boot_id, zlib.crc32(head))

    @classmethod
    def open(cls, path: Path) -> "Segment | None":
        """The segment at `path`, its torn tail cut off; None when even its head is torn (nothing was ever in it).

        SpoolError: it is no segment, or its head is damaged; the message names it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        data = path.read_bytes()
        if len(data) < HEAD_BYTES or not data.startswith((_MAGIC, _OLD_MAGIC)):
            os.close(descriptor)
            if len(data) > HEAD_BYTES:
                raise SpoolError(f"{path} is not a spool segment; move it out of the folder")
            return None
        _, boot = _HEAD.unpack_from(data)
        *_, head_crc = _MARK.unpack_from(data, _HEAD.size)
        if head_crc not in (0, zlib.crc32(data[: _HEAD.size])):
            os.close(descriptor)
            raise SpoolError(f"{path} is damaged in its head: whose items it holds is lost; move it out of the folder")
        segment = cls(path, descriptor, boot.rstrip(b"\0").decode("utf-8", "replace"), head_crc)
        segment._sum = _crc32 if data.startswith(_OLD_MAGIC) else checksum32
        segment._scan(data)
        return segment

    def append(self, seq: int, item: Sequence[Any]) -> None:
        """Write one record of these flat buffers. OSError leaves the file as it was."""
        length = sum(map(len, item))
        record = _RECORD.pack(length, self._sum([struct.pack("<QI", seq, length), *item]), seq)
        try:
            write_buffers(self._fd, [record, *item], self.size)
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.pending[seq] = (self.size, length)
        self.size += _RECORD.size + length
        self._last_seq = seq

    def read(self, seq: int) -> memoryview:
        """The item `seq`, a view: the robot's loop would wait while megabytes are copied once more.

        SpoolError when the disk returns other bytes than were written.
        """
        offset, length = self.pending[seq]
        record = os.pread(self._fd, _RECORD.size + length, offset)
        item = self._check(record, 0)
        if item is None:
            raise SpoolError(f"{self.path}: item {seq} does not match its CRC; the disk is damaged")
        return item[1]

    def ack(self, seq: int) -> None:
        """Forget `seq` and move the watermark to just below the oldest pending one."""
        del self.pending[seq]
        watermark = next(iter(self.pending)) - 1 if self.pending else self._last_seq
        if watermark > self._watermark:
            self._watermark = watermark
            try:
                os.pwrite(self._fd, _mark(watermark, self._head_crc), _HEAD.size)
            except OSError as error:
                log.warning("%s: acknowledged items will be sent again after a restart: %s", self.path, error.strerror)

    def close(self) -> None:
        """Close the file and leave it on disk."""
        os.close(self._fd)

    def delete(self) -> None:
        """Close and remove the file."""
        self.path.unlink()
        os.close(self._fd)

    def _scan(self, data: bytes) -> None:
        watermark, crc, _ = _MARK.unpack_from(data, _HEAD.size)
        # A damaged watermark is taken for 0: items may be sent again, none is forgotten.
        self._watermark = watermark if crc == zlib.crc32(struct.pack("<Q", watermark)) else 0
        while self.size < len(data):
            found = self._check(data, self.size)
            if found is None and (following := self._following(data)):
                if self._last_seq >= self._watermark:
                    log.error(
                        "%s is damaged at byte %d: an item is lost, those behind it are not", self.path, self.size
                    )
                self._last_seq += 1
                self.size = following
                continue
            if found is None:
                log.warning("spool %s: cut off a torn tail of %d bytes", self.path, len(data) - self.size)
                os.ftruncate(self._fd, self.size)
                return
            seq, item = found
            if seq > self._watermark:
                self.pending[seq] = (self.size, len(item))
            self._last_seq = seq
            self.size += _RECORD.size + len(item)

    def _following(self, data: bytes) -> int | None:
        """Where the next whole record begins, behind the damaged one that is at `size`; None: there is none."""
        if self.size + _RECORD.size > len(data):
            return None
        length, _, seq = _RECORD.unpack_from(data, self.size)
        behind = self.size + _RECORD.size + length
        if self._check(data, behind) is not None:
            return behind
        # Its length is what was damaged: the seqs of the records that follow are known.
        for expected in (self._last_seq + 2, seq + 1):  # a first record's predecessor is not known
            at = data.find(struct.pack("<Q", expected), self.size + _RECORD.size) - 8
            if at > self.size and self._check(data, at) is not None:
                return at
        return None

    def _check(self, data: bytes, offset: int) -> tuple[int, memoryview] | None:
        """(seq, item) of the record at `offset`, or None when it is torn."""
        if offset + _RECORD.size > len(data):
            return None
        length, total, seq = _RECORD.unpack_from(data, offset)
        start = offset + _RECORD.size
        item = memoryview(data)[start : start + length]
        if len(item) != length or self._sum([struct.pack("<QI", seq, length), item]) != total:
            return None
        return seq, item


def _mark(watermark: int, head_crc: int) -> bytes:
    return _MARK.pack(watermark, zlib.crc32(struct.pack("<Q", watermark)), head_crc)


def _crc32(buffers: Sequence[Any]) -> int:
    return zlib.crc32(b"".join(buffers))
