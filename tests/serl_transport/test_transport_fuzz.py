"""Every decoder that sees bytes of others, fuzzed: seeded damage to valid input, and input made of nothing.

Codec, envelope, messages of several items, step batch, spool segment, allow-list, and the openpi protocol's msgpack;
journal records have theirs beside the journal. Only typed errors may come out, and what is accepted must be what the
decoder promises.
"""

import random

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_samples import batch, spec

from openpi_client import msgpack_numpy
from serl_transport.contract.errors import SpoolError, WireError
from serl_transport.contract.schema import StepBatch
from serl_transport.delivery.segment import Segment
from serl_transport.security.allow_list import read_allow_list
from serl_transport.security.keys import KeyPair
from serl_transport.wire.blob import join, split
from serl_transport.wire.codec import pack, unpack
from serl_transport.wire.envelope import Envelope

ROUNDS = 3000
BYTES = st.binary(max_size=8)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=8), BYTES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=4)),
    max_leaves=12,
)  # fmt: skip


def damage(rng: random.Random, data: bytes) -> bytes:
    """Flip, insert, delete, repeat or cut."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(5):
            case 0 if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                del changed[at : at + rng.randrange(1, 9)]
            case 3:
                changed[at:at] = changed[at : at + 16]
            case 4:
                del changed[at:]
    return bytes(changed)


def test_envelopes():
    rng = random.Random(1)
    whole = Envelope("data", "robot-1", "boot", 7, 9, "store", ("code", "text")).to_frame([b"frame"])
    read = 0
    for _ in range(ROUNDS):
        try:
            envelope = Envelope.from_frame(damage(rng, whole))
            envelope.check([b"frame"])
            read += 1
        except WireError:
            continue
        assert type(envelope.seq) is int
        assert envelope.seq >= 0
        assert all(type(text) is str for text in (envelope.kind, envelope.actor_id, envelope.boot_id, envelope.target))
    assert read < ROUNDS / 20, "the checksum should catch nearly all of it"


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_envelopes_of_anything(value):
    try:
        envelope = Envelope.from_frame(msgpack.packb(value))
    except WireError:
        return
    assert isinstance(value, dict)
    assert type(envelope.version) is int


def test_step_batches_with_damaged_frames():
    rng = random.Random(2)
    frames = [bytes(memoryview(frame)) for frame in pack(batch(final=True).to_body())]
    task, accepted = spec(), 0
    for _ in range(ROUNDS):
        spoilt = list(frames)
        at = rng.randrange(len(frames))
        spoilt[at] = damage(rng, frames[at])
        try:
            result = StepBatch.from_body(unpack(spoilt), task)
        except WireError:
            continue
        accepted += 1
        result.check(task)
        assert np.isfinite(result.arrays["action"]).all()
    assert 0 < accepted < ROUNDS


@given(JSON, st.sampled_from(["episode", "first_tick", "final", "outcome", "arrays", "new"]))
@settings(max_examples=300, deadline=None)
def test_step_batches_of_anything(value, key):
    body = batch(final=True).to_body()
    right = body.get(key, ...)
    body[key] = value
    try:
        StepBatch.from_body(body, spec())
    except WireError:
        return
    # A first tick may be any that fits the task; everything else has one right form here.
    assert key == "first_tick" or value == right or (key == "final" and value is True)


def test_blobs():
    rng = random.Random(3)
    whole = join([b"head", b"", bytes(100)])
    for _ in range(ROUNDS):
        try:
            frames = split(damage(rng, whole))
        except WireError:
            continue
        assert sum(map(len, frames)) <= 2 * len(whole)


def test_spool_segments(tmp_path, caplog):
    rng = random.Random(4)
    path = tmp_path / "000001.seg"
    segment = Segment.create(path, "boot-1")
    items = {seq: rng.randbytes(rng.randrange(200)) for seq in range(1, 8)}
    for seq, item in items.items():
        segment.append(seq, [item[:50], item[50:]])
    segment.ack(1)
    segment.close()
    whole = path.read_bytes()
    for _ in range(400):
        path.write_bytes(damage(rng, whole))
        try:
            opened = Segment.open(path)
        except SpoolError:
            continue
        if opened is None:
            continue
        # Whatever is still there is exactly what was appended; the rest was cut off, never invented.
        assert all(opened.read(seq) == items[seq] for seq in opened.pending)
        opened.close()


def test_allow_lists(tmp_path):
    rng = random.Random(5)
    path = tmp_path / "allow_list"
    keys = [KeyPair.new().public for _ in range(3)]
    whole = b"".join(b"actor robot-%d %s\n" % (i, key) for i, key in enumerate(keys))
    for _ in range(500):
        path.write_bytes(damage(rng, whole))
        try:
            entries = read_allow_list(path)
        except ValueError:
            continue
        assert all(
            entry.role in ("actor", "operator", "follower") and len(entry.key) == 40 for entry in entries.values()
        )


def test_openpi_messages():
    rng = random.Random(6)
    whole = msgpack_numpy.packb(
        {"image": np.zeros((4, 4, 3), np.uint8), "state": np.ones(3), "n": np.float32(2), "t": "x"}
    )
    for _ in range(ROUNDS):
        try:
            msgpack_numpy.unpackb(damage(rng, whole))
        except ValueError:
            continue


@pytest.mark.parametrize(
    "hostile",
    [
        {b"__ndarray__": True},
        {b"__ndarray__": True, b"data": b"", b"dtype": "O", b"shape": [0]},
        {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f8", b"shape": [-1, -1]},
        {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f8", b"shape": 5},
        {b"__ndarray__": True, b"data": 5, b"dtype": "<f8", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"", b"dtype": "f8,f8", b"shape": [0]},
        {b"__ndarray__": True, b"data": b"", b"dtype": "(2,2)f8", b"shape": [0]},
        {b"__ndarray__": True, b"data": b"", b"dtype": 7, b"shape": [0]},
        {b"__ndarray__": True, b"data": b"", b"dtype": "u1", b"shape": [0, 1 << 63]},
        {b"__npgeneric__": True, b"data": "x", b"dtype": "<f8"},
        {b"__npgeneric__": True, b"dtype": "O"},
    ],
)
def test_hostile_openpi_arrays_are_value_errors(hostile):
    with pytest.raises(ValueError):
        msgpack_numpy.unpackb(msgpack.packb({"x": hostile}))
