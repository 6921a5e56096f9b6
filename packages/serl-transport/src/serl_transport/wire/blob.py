"""The frames of a body as one blob and back: the form of journal, spool, parameters and messages of several items.

frames ─▶ join ─▶ [magic | number of frames | their lengths | frames, each padded to 8 bytes] ─▶ split ─▶ views
"""

import struct
import zlib
from collections.abc import Sequence
from typing import Any

from serl_transport.contract.errors import BadFrame
from serl_transport.wire.codec import Buffer, buffer_of

BLOB = struct.Struct("<4sI")  # magic, number of frames; then u64 lengths, then the frames, each padded to 8 bytes
BLOB_MAGIC = b"SJB1"


def join(frames: Sequence[Any]) -> bytes:
    """One blob of `frames` for a file; every frame starts at a multiple of 8 bytes."""
    return b"".join(join_parts(frames))


def join_parts(frames: Sequence[Any]) -> list[Any]:
    """The same blob as flat buffers to be written one after the other; frames are not copied."""
    views = [buffer_of(frame) for frame in frames]
    sizes = [view.nbytes for view in views]
    parts: list[Any] = [BLOB.pack(BLOB_MAGIC, len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)]
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
    if len(blob) < BLOB.size:
        raise BadFrame(f"a blob of {len(blob)} bytes is shorter than its {BLOB.size} byte head")
    magic, count = BLOB.unpack_from(blob)
    if magic != BLOB_MAGIC:
        raise BadFrame(f"a blob starts with {BLOB_MAGIC!r}, got {bytes(magic)!r}")
    start = BLOB.size + 8 * count
    if start > len(blob):
        raise BadFrame(f"a blob of {len(blob)} bytes cannot hold the lengths of {count} frames")
    frames = []
    for size in struct.unpack_from(f"<{count}Q", blob, BLOB.size):
        end = start + size + (-size % 8)
        if end > len(blob):
            raise BadFrame(f"a blob of {len(blob)} bytes ends inside frame {len(frames)}, which ends at {end}")
        frames.append(blob[start : start + size])
        start = end
    if start != len(blob):
        raise BadFrame(f"{len(blob) - start} bytes after a blob's last frame")
    return frames
