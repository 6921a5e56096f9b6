"""Seeded hostile datagrams for a line between an actor and a gateway on one host (serl_transport/same_host.py)."""

from __future__ import annotations

import random

import msgpack
import numpy as np

from serl_transport.same_host import SLOTS
from serl_transport.wire.codec import pack

SIZE = 224 * 224 * 3  # bytes of the image that they claim to have put into their slot


def datagram(rng: random.Random, slot_bytes: int, request_id: int) -> bytes:
    """A datagram that is no question, or one that reaches where it may not."""
    header = bytes(pack({"image": np.zeros(SIZE, np.uint8)})[0])
    slot = rng.randrange(SLOTS)
    start, size = slot * slot_bytes, SIZE
    note = rng.choice([
        [header, [start + slot_bytes - size + 1, size]], [header, [-1, size]], [header, [start, 1 << 62]],
        [header, [(1 << 63) - 1, size]], [header, [(1 - slot) * slot_bytes, size]], [header], [], {}, 5, b"",
        [header, [start, size - 1]], [header, [start, size], [start, size]], [header, *[[start, 0]] * 2000],
        [rng.randbytes(100), [start, size]], [b"\xdd\xff\xff\xff\xff"], [b"\x91" * 30_000], [header, [1.5, None]],
        [header, [start]], [[start, size], [start, size]], [header, b"inline"], ["text", [start, size]],
    ])  # fmt: skip
    packed = rng.choice([msgpack.packb(note)] * 9 + [rng.randbytes(50)])
    whole = rng.choice([[request_id, slot, packed]] * 30 + [
        [request_id, SLOTS, packed], [request_id, -1, packed], [request_id, 1 << 62, packed], [request_id, slot],
        ["x", slot, packed], [request_id, None, packed], [request_id, slot, note], 7, None, [True, True, packed],
    ])  # fmt: skip
    return rng.choice([msgpack.packb(whole)] * 30 + [rng.randbytes(rng.randrange(1, 2000)), b"\0", bytes(70_000)])
