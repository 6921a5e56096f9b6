"""Several items of one actor in one message: one envelope, one checksum and one reply for all of them.

    outbox ─▶ write([(seq, frames), ...]) ─▶ [envelope kind "items" | one frame] ─▶ router ─▶ read ─▶ handler of "data"
    outbox ◀── refusals ◀── [reply: which items were refused, and why] ◀── Gathering ◀── an answer for each item

The frame: magic, number of items u32; per item its seq u64 and the length of its blob u64; then the blobs, each made by
`blob.join`. Actor, boot and store are the envelope's, so they are the same for all items. What a small item costs is
mostly its own message; what is larger than a bundle travels alone, as frames.
"""

import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from serl_transport.contract.errors import BadFrame, TooLarge, WireError
from serl_transport.wire.blob import join_parts
from serl_transport.wire.codec import Frames, Limits, buffer_of, check_sizes, nbytes

ITEMS = "items"  # the envelope's kind
MAX_ITEMS = 16
MAX_BYTES = 1 << 20  # of all items together: it is copied and summed while it is in the processor's own cache
MOST_OPEN = 256  # bundles of one connection whose answers are not all there: four times what a window can hold
_HEAD = struct.Struct("<4sI")
_ITEM = struct.Struct("<QQ")
_MAGIC = b"SJI1"
_OVERHEAD = 64 << 10  # what heads, lengths and padding may add to MAX_BYTES


def write(items: Sequence[tuple[int, Frames]]) -> bytes:
    """The frame of these items `(seq, body frames)`; the frames are copied."""
    table, blobs = [_HEAD.pack(_MAGIC, len(items))], []
    for seq, frames in items:
        parts = join_parts(frames)
        table.append(_ITEM.pack(seq, sum(map(nbytes, parts))))
        blobs += parts
    return b"".join(table + blobs)


def read(frames: Sequence[Any], limits: Limits) -> list[tuple[int, memoryview]]:
    """`(seq, blob)` of each item; `blob.split` reads the blobs. BadFrame or TooLarge for all but `write`'s frame."""
    check_sizes([b"", *frames], limits)
    if len(frames) != 1:
        raise BadFrame(f"a message of items has one frame, got {len(frames)}")
    whole = buffer_of(frames[0]).toreadonly()
    if len(whole) > MAX_BYTES + _OVERHEAD:
        raise TooLarge(f"items of {len(whole)} bytes in one message, the limit is {MAX_BYTES + _OVERHEAD}")
    if len(whole) < _HEAD.size:
        raise BadFrame(f"a message of items has a head of {_HEAD.size} bytes, got {len(whole)}")
    magic, count = _HEAD.unpack_from(whole)
    if magic != _MAGIC or not 1 <= count <= MAX_ITEMS:
        raise BadFrame(f"a message of items starts with {_MAGIC!r} and their number, 1 to {MAX_ITEMS}")
    at = _HEAD.size + count * _ITEM.size
    if at > len(whole):
        raise BadFrame(f"{len(whole)} bytes cannot hold the table of {count} items")
    items = []
    for seq, size in _ITEM.iter_unpack(whole[_HEAD.size : at]):
        items.append((seq, whole[at : at + size]))
        at += size
    if at != len(whole):
        raise BadFrame(f"{count} items of {at} bytes in all, the message has {len(whole)}")
    return items


class Gathering:
    """The answers to one bundle, while they come in."""

    __slots__ = ("_open", "_refused", "serial")

    def __init__(self, serial: int, items: int):
        self.serial = serial  # tells a repeated message's answers from those of the first
        self._open = set(range(items))
        self._refused: list[tuple[int, str, str]] = []

    def put(self, index: int, error: WireError | None) -> bool:
        """Item `index` was taken (None) or refused; True when this was the last answer. A second answer is ignored."""
        if index not in self._open:
            return False
        self._open.discard(index)
        if error is not None:
            self._refused.append((index, error.code, error.message))
        return not self._open

    def reply(self) -> Frames:
        """The reply's frames: none when every item was taken."""
        return [msgpack.packb({"refused": self._refused})] if self._refused else []


def refusals(reply: dict[str, Any], items: int) -> dict[int, WireError]:
    """Which of `items` items a reply's body refuses, and why. BadFrame for a body that says no such thing."""
    refused = reply.get("refused", [])
    if not isinstance(refused, list):
        raise BadFrame("refused: expected a list")
    found = {}
    for entry in refused:
        if not isinstance(entry, list) or [type(field) for field in entry] != [int, str, str]:
            raise BadFrame("refused: expected [index, code, message]")
        index, code, message = entry
        if not 0 <= index < items:
            raise BadFrame(f"refused: item {index} of {items}")
        found[index] = WireError.from_code(code, message)
    return found
