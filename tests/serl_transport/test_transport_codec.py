"""Frames: what goes in comes out, and nothing hostile comes out as anything but a typed error."""

import contextlib
import os
import zlib
from types import MappingProxyType

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serl_transport.contract.errors import BadFrame, TooLarge, WireError
from serl_transport.wire.blob import blob_crc32, join, split, write_buffers
from serl_transport.wire.codec import DTYPES, INLINE_BYTES, Limits, buffer_of, pack, unpack

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(), st.binary()
)
ARRAYS = st.builds(
    lambda name, shape, seed: (np.random.default_rng(seed).integers(0, 2, shape)).astype(name),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.integers(0, 99),
)
TREES = st.recursive(
    st.one_of(SCALARS, ARRAYS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


def same(left, right) -> bool:
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), TREES, max_size=4))
def test_every_body_survives_frames_and_blob(body):
    frames = pack(body)
    assert same(unpack(frames), body)
    assert same(unpack(split(join(frames))), body)


def test_arrays_are_packed_without_a_copy_and_read_only_on_arrival():
    image = np.zeros((20, 30, 3), np.uint8)
    frames = pack({"image": image})
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), image)
    got = unpack(frames)["image"]
    with pytest.raises(ValueError, match="read-only"):
        got[0, 0, 0] = 1


def test_foreign_arrays_and_mappings_become_plain():
    class Foreign:
        def __array__(self, dtype=None, copy=None):
            return np.arange(3, dtype=np.float32)

    got = unpack(pack({"params": MappingProxyType({"w": Foreign()})}))
    np.testing.assert_array_equal(got["params"]["w"], [0, 1, 2])


def test_small_arrays_travel_in_the_header():
    small = np.arange(INLINE_BYTES, dtype=np.uint8)
    frames = pack({"small": small, "large": np.zeros(INLINE_BYTES + 1, np.uint8), "none": np.zeros((3, 0), np.float32)})
    assert len(frames) == 2
    small[:] = 0  # packed is packed
    got = unpack(frames)
    assert got["small"][-1] == 255
    assert got["none"].shape == (3, 0)
    assert not got["small"].flags.writeable


def test_views_scalars_and_foreign_byte_order_become_plain():
    grid = np.arange(12, dtype=">i4").reshape(3, 4)
    got = unpack(pack({"t": grid.T[::2], "f": np.float32(1.5), "b": np.bool_(True), "pair": (1, 2)}))
    np.testing.assert_array_equal(got["t"], grid.T[::2])
    assert got["t"].dtype == np.int32
    assert (got["f"], got["b"], got["pair"]) == (1.5, True, [1, 2])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"a": {"b": object()}}, "body.a.b: object has no form on the wire"),
        ({"a": [np.array(["x"])]}, r"body.a\[0\]: dtype <U1 is not allowed"),
        ({"a": np.zeros(2, dtype=[("x", "f4")])}, "is not allowed on the wire"),
        ({"a": np.array([None])}, "dtype object is not allowed"),
        ({1: "x"}, "keys are texts, got 1"),
        ([1], "a body is a dict, got list"),
    ],
)
def test_what_has_no_form_on_the_wire_is_named(body, message):
    with pytest.raises(TypeError, match=message):
        pack(body)


def array_ext(dtype="uint8", shape=(2,), index=1) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb([dtype, list(shape), index]))


def deep(levels: int) -> dict:
    body: dict = {}
    for _ in range(levels):
        body = {"x": body}
    return body


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [msgpack.packb([1, 2])],
        [msgpack.packb({"a": 1}) + b"\x00"],
        [msgpack.packb({1: 2})],
        [b"\x82\xa1a\x01\xa1a\x02"],  # the key "a" twice
        [msgpack.packb({b"a": 1})],
        [msgpack.packb({"t": msgpack.Timestamp(1)})],
        [msgpack.packb({"x": msgpack.ExtType(7, b"")})],
        [msgpack.packb(deep(40))],
        [msgpack.packb({"x": array_ext()})],  # names a frame that is not there
        [msgpack.packb({"x": array_ext()}), b"123"],  # one byte too many
        [msgpack.packb({"x": array_ext(shape=(3,))}), b"12"],  # one byte too few
        [msgpack.packb({"x": array_ext(), "y": array_ext()}), b"12"],  # one frame for two arrays
        [msgpack.packb({"x": 1}), b"12"],  # a frame for no array
        [msgpack.packb({"x": array_ext(index=0)}), b"12"],
        [msgpack.packb({"x": array_ext(index=-1)}), b"12"],
        [msgpack.packb({"x": array_ext(index=True)}), b"12"],
        [msgpack.packb({"x": array_ext("object", (1,))}), b"12345678"],
        [msgpack.packb({"x": array_ext("bool")}), b"\x01\x07"],  # no bool
        [msgpack.packb({"x": array_ext(shape=(-1,))}), b"12"],
        [msgpack.packb({"x": array_ext(shape=(2.0,))}), b"12"],
        [msgpack.packb({"x": array_ext(shape=(1 << 39, 1 << 39, 0))}), b""],
        [msgpack.packb({"x": array_ext(shape=(1,) * 40)}), b"1"],
        [msgpack.packb({"x": msgpack.ExtType(1, b"\xc1")}), b"1"],
        [msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb({"dtype": "u1"}))}), b"1"],
    ],
)
def test_hostile_frames_are_bad_frames(frames):
    with pytest.raises(BadFrame):
        unpack(frames)


@pytest.mark.parametrize(
    "limits",
    [Limits(header_bytes=10), Limits(frame_bytes=1500), Limits(total_bytes=3000), Limits(frames=2), Limits(rank=1)],
)
def test_every_limit_holds_in_both_directions(limits):
    body = {"a": np.zeros((10, 200), np.uint8), "b": np.zeros(1200, np.uint8)}
    with pytest.raises(TooLarge):
        pack(body, limits)
    with pytest.raises(WireError):
        unpack(pack(body), limits)


def test_depth_limit_holds_in_both_directions():
    unpack(pack(deep(15)))
    with pytest.raises(TooLarge, match="nested deeper than 16"):
        pack(deep(17))


def test_random_damage_never_escapes_the_typed_errors():
    """2,000 seeded mutations of a good message: a body or a WireError, nothing else."""
    rng = np.random.default_rng(0)
    good = [
        bytes(buffer_of(frame)) for frame in pack({"a": np.arange(6, dtype=np.float32), "b": [1, "x", {"c": None}]})
    ]
    bodies = 0
    for _ in range(2000):
        frames = [bytearray(frame) for frame in good]
        for _ in range(rng.integers(1, 4)):
            frame = frames[rng.integers(len(frames))]
            at = rng.integers(len(frame)) if frame else 0
            match rng.integers(3):
                case 0 if frame:
                    frame[at] = rng.integers(256)
                case 1:
                    frame.insert(at, rng.integers(256))
                case _ if frame:
                    del frame[at]
        with contextlib.suppress(WireError):
            bodies += isinstance(unpack(frames), dict)
    assert bodies > 100  # damage in the array's bytes alone is a valid message


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_no_blob_and_no_header(data):
    for decode in (lambda: split(data), lambda: unpack([data])):
        with contextlib.suppress(WireError):
            decode()


def test_a_blob_of_any_other_length_is_refused():
    blob = join(pack({"a": np.arange(3, dtype=np.uint8)}))
    for cut in range(len(blob)):
        with pytest.raises(BadFrame):
            split(blob[:cut])
    with pytest.raises(BadFrame, match="8 bytes after"):
        split(blob + bytes(8))


def test_many_buffers_are_written_whole_whatever_the_system_takes_at_a_time(tmp_path, monkeypatch):
    buffers = [bytes([i % 251]) * (i % 7) for i in range(3000)]
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: real(fd, [b"".join(map(bytes, parts))[:1001]], at))
    with open(tmp_path / "f", "wb") as file:
        assert write_buffers(file.fileno(), buffers, 3) == sum(map(len, buffers))
    assert (tmp_path / "f").read_bytes() == b"\0\0\0" + b"".join(buffers)
    assert blob_crc32([b"abc", b""]) == zlib.crc32(join([b"abc", b""]))


def test_layouts_that_were_seen_are_checked_as_strictly_as_new_ones():
    """Descriptors are cached on both sides: a cached one must not let anything through that a fresh one would not."""
    for _ in range(3):
        body = {"b": np.array([True, False]), "i": np.arange(3), "e": np.zeros((0, 4), np.float32), "s": np.float64(2)}
        for key, value in unpack(pack(body)).items():
            np.testing.assert_array_equal(value, body[key])
        header = pack({"b": np.array([True, False])})[0]
        with pytest.raises(BadFrame, match="a bool is 0 or 1"):
            unpack([header.replace(b"\1\0", b"\1\2")])
        with pytest.raises(BadFrame, match="at most 1 sizes"):
            unpack(pack({"x": np.zeros((1, 2))}), Limits(rank=1))
        with pytest.raises(TooLarge, match="2 dims, the limit is 1"):
            pack({"x": np.zeros((1, 2))}, Limits(rank=1))
        big = pack({"x": np.zeros(5000, np.uint8)})
        with pytest.raises(BadFrame, match="is 5000 bytes, frame 1 has 4999"):
            unpack([big[0], bytes(4999)])
        with pytest.raises(BadFrame, match="frame 2 belongs to no array"):
            unpack([*big, b""])
    swapped = np.arange(4, dtype=">i4")
    np.testing.assert_array_equal(unpack(pack({"x": swapped}))["x"], swapped)
    strided = np.arange(4000, dtype=np.uint8).reshape(2, 2000)[:, ::2]
    np.testing.assert_array_equal(unpack(pack({"x": strided}))["x"], strided)


def test_a_descriptor_that_was_seen_is_still_held_to_the_limits_and_to_its_frame():
    frames = pack({"a": np.zeros((1, 2, 600), np.uint8), "b": np.ones(1200, np.uint8)})
    assert unpack(frames)["b"].all()  # from now on both descriptors are known
    with pytest.raises(BadFrame, match="at most 2 sizes"):
        unpack(frames, Limits(rank=2))
    with pytest.raises(BadFrame, match="is 1200 bytes, frame 2 has 7"):
        unpack([*frames[:2], bytes(7)])
    with pytest.raises(BadFrame, match="names frame 2, which does not exist or is taken"):
        unpack(frames[:2])


def test_strided_arrays_and_more_frames_than_a_byte_can_number_come_back():
    base = np.arange(4000, dtype=np.int32).reshape(20, 200)
    body = {f"k{i}": base + i for i in range(200)} | {"turned": base.T, "every other": base[::2, ::2]}
    back = unpack(pack(body))
    for key, array in body.items():
        np.testing.assert_array_equal(back[key], array)
