"""Pictures that are packed come back as they went in; JPEG says that they do not; hostile ones are typed errors."""

import struct

import msgpack
import numpy as np
import pytest
from backports import zstd

from serl_transport.contract.errors import BadFrame, TooLarge, WireError
from serl_transport.contract.packed import Packed
from serl_transport.wire import pictures
from serl_transport.wire.codec import Limits, pack, unpack


def scene(m: int, h: int = 40, w: int = 60, noise: float = 0.0, moves: bool = False) -> np.ndarray:
    """A drawn scene, uint8[m, h, w, 3], with a thing that goes through it, or as a camera that moves sees it."""
    y, x = np.mgrid[:h, :w]
    still = np.stack([20 + 3 * y, 200 - 2 * x, 60 + 40 * ((x // 7 + y // 5) % 2)], -1).astype(np.float64)
    result = np.stack([np.roll(still, 11 * i * moves, 1) for i in range(m)])
    for i in range(m):
        result[i, 10:16, (3 * i) % (w - 8) : (3 * i) % (w - 8) + 6] = (200, 30, 30)
    result += np.random.default_rng(0).normal(0, noise, result.shape) if noise else 0
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("array", "kind", "ratio"),
    [
        (scene(10), "time", 20),
        (scene(10, noise=2.0), "time", 1.8),
        (scene(10, moves=True), "rows", 4),
        (scene(1), "rows", 4),
        (scene(11)[:, ::2, ::-1], "time", 10),  # no contiguous array
        (scene(3, h=1, w=400), "time", 3),
    ],
)
def test_every_pixel_comes_back(array, kind, ratio):
    frames = pack({"images": {"front": array}, "n": 3}, pictures="lossless")
    assert len(frames[1]) * ratio < array.nbytes
    left = unpack(frames, leave_packed=True)["images"]["front"]
    assert (left.kind, left.shape, left.nbytes) == (kind, array.shape, array.nbytes)
    got = unpack(frames)
    np.testing.assert_array_equal(got["images"]["front"], array)
    assert not got["images"]["front"].flags.writeable
    assert got["n"] == 3


def test_what_does_not_get_smaller_and_what_is_no_picture_travels_as_it_is():
    rng = np.random.default_rng(0)
    body = {"noise": rng.integers(0, 256, (4, 20, 20, 3), np.uint8), "one": scene(1)[0], "maps": scene(2)[..., :2]}
    frames = pack(body, pictures="lossless")
    assert [len(frame) for frame in frames[1:]] == [array.nbytes for array in body.values()]
    for key, array in unpack(frames).items():
        np.testing.assert_array_equal(array, body[key])


def test_jpeg_is_smaller_looks_the_same_and_says_what_it_is():
    array = scene(10, noise=2.0)
    frames = pack({"a": array}, pictures="jpeg:90")
    assert len(frames[1]) < len(pack({"a": array}, pictures="lossless")[1]) / 2
    left = unpack(frames, leave_packed=True)["a"]
    assert left.kind == "jpeg:90"
    assert pictures.lossy(left.kind)
    error = np.abs(unpack(frames)["a"].astype(int) - array)
    assert 0 < error.mean() < 4


@pytest.mark.parametrize("how", ["png", "jpeg", "jpeg:0", "jpeg:101", "jpeg:٩", "jpeg:9.5", None, 90, True])
def test_an_unknown_way_is_refused_by_the_key_s_name(how):
    with pytest.raises(ValueError, match=r"rollout\.pictures: expected lossless, raw or jpeg:<quality from 1 to 100>"):
        pictures.check_pictures("rollout.pictures", how)


def hostile(kind, shape, data: bytes) -> list[bytes]:
    return [msgpack.packb({"a": msgpack.ExtType(3, msgpack.packb([kind, list(shape), 1]))}), data]


ZEROS = zstd.compress(bytes(2 * 4 * 5 * 3), 1)
JPEG = pack({"a": scene(2, 40, 60)}, pictures="jpeg:50")[1]


@pytest.mark.parametrize(
    "frames",
    [
        hostile("time", (2, 4, 5, 3), b"no zstd"),
        hostile("time", (2, 4, 5, 3), ZEROS[:-1]),
        hostile("time", (2, 4, 5, 3), ZEROS + b"x"),
        hostile("time", (1, 4, 5, 3), ZEROS),  # more in it than it says
        hostile("rows", (3, 4, 5, 3), ZEROS),  # less
        hostile("time", (2, 4, 5, 4), ZEROS),
        hostile("time", (0, 4, 5, 3), zstd.compress(b"", 1)),
        hostile("time", (120,), ZEROS),
        hostile("magic", (2, 4, 5, 3), ZEROS),
        hostile("jpeg:0", (2, 40, 60, 3), JPEG),
        hostile("jpeg:50", (2, 40, 61, 3), JPEG),
        hostile("jpeg:50", (3, 40, 60, 3), JPEG),
        hostile("jpeg:50", (2, 40, 60, 3), JPEG[:-1]),
        hostile("jpeg:50", (1, 4, 5, 3), struct.pack("<I", 4) + b"\xff\xd8\xff\xd9"),
        hostile("jpeg:50", (1, 4, 5, 3), struct.pack("<I", 300) + bytes(300)),
    ],
)
def test_hostile_pictures_are_bad_frames(frames):
    with pytest.raises(BadFrame):
        unpack(frames)


def test_a_small_message_cannot_unpack_to_a_large_one():
    bomb = zstd.compress(bytes(10**6), 1)
    with pytest.raises(TooLarge, match="unpack to"):
        unpack(hostile("time", (1, 10**5, 10**5, 3), bomb))  # by its descriptor, before anything is unpacked
    with pytest.raises(BadFrame, match="expected exactly 60 bytes"):
        unpack(hostile("time", (1, 4, 5, 3), bomb))
    array = scene(10)
    for limits in (Limits(frame_bytes=array.nbytes - 1), Limits(total_bytes=array.nbytes + 5)):
        with pytest.raises(TooLarge):
            pack({"a": array}, limits, "lossless")
        with pytest.raises(WireError):
            unpack(pack({"a": array}, pictures="lossless"), limits, leave_packed=True)


def test_bytes_that_lost_a_bit_never_come_out_as_other_pictures_without_an_error_or_at_the_wrong_size():
    array = scene(4)
    kind, data = pictures.packed(array, "lossless")
    for at in range(0, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 0x10
        try:
            got = pictures.unpacked(Packed(kind, array.shape, memoryview(broken)))
        except BadFrame:
            continue
        assert got.shape == array.shape  # the message's checksum is what finds these
