"""The checksum of everything that crosses a wire or a disk: XXH3, 64 bits.

Envelope, spool segments and the journal call it. It costs a tenth of what zlib's CRC-32 does, and a message's bytes are
summed four times between a camera and the learner's disk. Like a CRC it
finds accidents, not forgers: those meet CURVE.
"""

from collections.abc import Iterable
from typing import Any

from xxhash import xxh3_64


def checksum64(buffers: Iterable[Any]) -> int:
    """Of the flat buffers' bytes, one after the other, wherever one ends and the next begins."""
    state = xxh3_64()
    for buffer in buffers:
        state.update(buffer)
    return state.intdigest()


def checksum32(buffers: Iterable[Any]) -> int:
    """The lower half, where a file's format has 32 bits for it."""
    return checksum64(buffers) & 0xFFFFFFFF
