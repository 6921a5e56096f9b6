"""The frames of a body as one blob and back, the form of journal, spool and parameters; the checksum of bytes.

frames ─▶ join ─▶ [magic | number of frames | their lengths | frames, each padded to 8 bytes] ─▶ split ─▶ views
"""

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from xxhash import xxh3_64

from serl_transport.contract.errors import BadFrame
from serl_transport.wire.codec import Buffer, buffer_of

_HEAD = struct.Struct("<4sI")  # magic, number of frames; then u64 lengths, then the frames, each padded to 8 bytes
BLOB_MAGIC = b"SJB1"
_MAX_BUFFERS = 1024  # IOV_MAX of Linux


def join(frames: Sequence[Any]) -> bytes:
    """One blob of `frames` for a file; every frame starts at a multiple of 8 bytes."""
    return b"".join(join_parts(frames))


def join_parts(frames: Sequence[Any]) -> list[Any]:
    """The same blob as flat buffers to be written one after the other; frames are not copied."""
    views = [buffer_of(frame) for frame in frames]
    sizes = [view.nbytes for view in views]
    parts: list[Any] = [_HEAD.pack(BLOB_MAGIC, len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)]
    for view, size in zip(views, sizes, strict=True):
        parts.append(view)
        if size % 8:
            parts.append(bytes(-size % 8))
    return parts


def blob_crc32(frames: Sequence[Any]) -> int:
    """crc32 of `join(frames)`, without joining them."""
    crc = 0
    for part in join_parts(frames):
        crc = zlib.crc32(part, crc)
    return crc


def split(buffer: Buffer) -> list[memoryview]:
    """The frames of a blob made by `join`, as views. BadFrame when a single byte is missing or left over."""
    blob = memoryview(buffer).cast("B")
    if len(blob) < _HEAD.size:
        raise BadFrame(f"a blob of {len(blob)} bytes is shorter than its {_HEAD.size} byte head")
    magic, count = _HEAD.unpack_from(blob)
    if magic != BLOB_MAGIC:
        raise BadFrame(f"a blob starts with {BLOB_MAGIC!r}, got {bytes(magic)!r}")
    start = _HEAD.size + 8 * count
    if start > len(blob):
        raise BadFrame(f"a blob of {len(blob)} bytes cannot hold the lengths of {count} frames")
    frames = []
    for size in struct.unpack_from(f"<{count}Q", blob, _HEAD.size):
        end = start + size + (-size % 8)
        if end > len(blob):
            raise BadFrame(f"a blob of {len(blob)} bytes ends inside frame {len(frames)}, which ends at {end}")
        frames.append(blob[start : start + size])
        start = end
    if start != len(blob):
        raise BadFrame(f"{len(blob) - start} bytes after a blob's last frame")
    return frames


def checksum64(buffers: Iterable[Any]) -> int:
    """XXH3 of the flat buffers' bytes, one after the other: what guards everything that crosses a wire or a disk.

    It costs a tenth of zlib's CRC-32. Like a CRC it finds accidents, not forgers: those meet CURVE.
    """
    state = xxh3_64()
    for buffer in buffers:
        state.update(buffer)
    return state.intdigest()


def checksum32(buffers: Iterable[Any]) -> int:
    """The lower half, where a file's format has 32 bits for it."""
    return checksum64(buffers) & 0xFFFFFFFF


def write_buffers(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
    """Write flat buffers one after the other at `offset`; their total size. OSError may leave a part written."""
    start = offset
    rest = [view for view in map(memoryview, buffers) if view.nbytes]
    while rest:
        group = rest[:_MAX_BUFFERS]
        written = os.pwritev(descriptor, group, offset)
        offset += written
        # A full disk or a signal may cut a write short: go on with what is left until all is written or it raises.
        done = 0
        while done < len(group) and written >= group[done].nbytes:
            written -= group[done].nbytes
            done += 1
        rest = rest[done:]
        if written:
            rest[0] = rest[0][written:]
    return offset - start
