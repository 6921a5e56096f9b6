"""A blob that arrived in pieces, read without putting them together. `params.pull_frames` calls it.

Copying 10 MB into one piece takes as long as a tenth of their way over a local network, and needs the memory twice.
"""

import struct
from collections.abc import Sequence

import numpy as np

from serl_transport.wire.blob import BLOB, split
from serl_transport.wire.codec import Frames


def split_pieces(parts: Sequence[np.ndarray]) -> Frames:
    """The frames of a blob made by `blob.join`, from its parts uint8[k] in order; BadFrame as `blob.split`.

    A frame that lies within one part is a view of it; others are copied together.
    """
    head = parts[0].data if parts else memoryview(b"")
    count = BLOB.unpack_from(head)[1] if len(head) >= BLOB.size else 0
    start = BLOB.size + 8 * count
    if len(parts) == 1 or start > len(head):
        return list(split(np.concatenate(parts).data if len(parts) > 1 else head))
    sizes = struct.unpack_from(f"<{count}Q", head, BLOB.size)
    total = sum(map(len, parts))
    if start + sum(size + -size % 8 for size in sizes) != total:
        return list(split(np.concatenate(parts).data))  # it says what is wrong
    frames: Frames = []
    index, begin = 0, 0  # of the part that holds `start`, and where it begins in the blob
    for size in sizes:
        while index < len(parts) - 1 and start >= begin + len(parts[index]):
            begin += len(parts[index])
            index += 1
        frames.append(_piece(parts, index, start - begin, size))
        start += size + -size % 8
    return frames


def _piece(parts: Sequence[np.ndarray], index: int, offset: int, size: int) -> memoryview:
    """`size` bytes from `offset` in part `index` on."""
    found = [parts[index][offset : offset + size]]
    while (missing := size - sum(map(len, found))) > 0:
        index += 1
        found.append(parts[index][:missing])
    return (np.concatenate(found) if len(found) > 1 else found[0]).data
