"""Bodies to frames and back: msgpack for structure, raw bytes for arrays, nothing that can execute.

Client, server, spool and journal call this. A body is a nested dict of str keys with None, bool, int, float, str,
bytes, lists, dicts and numpy arrays. `pack` gives frame 0, a msgpack header in which every array is a descriptor
(dtype name, shape, frame index), and one frame of little-endian bytes per array; arrays up to 1 KiB lie in the header
itself. `blob.py` turns the frames into one blob and back, for files. Where it is asked for, pictures are packed
(`pictures.py`): their descriptor says how, and their frame has the packed bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from serl_transport.contract.errors import BadFrame, TooLarge, WireError
from serl_transport.contract.packed import Packed
from serl_transport.wire.pictures import RAW, are_pictures, check_packed, packed, unpacked

Buffer = bytes | bytearray | memoryview
Frames = list[Any]  # buffers: bytes, memoryview or zmq.Frame

DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}
_ARRAY = 1  # msgpack extension type of an array's descriptor: [dtype, shape, frame index]
_INLINE = 2  # of a small array: [dtype, shape, bytes]
_PICTURES = 3  # of packed pictures: [how, shape, frame index]
SHARED_BYTES = 512 << 10  # up to this a frame is copied to be sent: pyzmq's hand-over of memory would cost more
INLINE_BYTES = 1024  # up to this an array travels in the header: a frame of its own would cost more than a copy
_SCALARS = (bool, int, float, str, bytes)
_PLAIN = frozenset((*_SCALARS, type(None)))
_LEAVES = _PLAIN | {np.ndarray, Packed}
_MAX_DIMS = 32  # of numpy
_Path = Any  # "body", or (path of the container, key or index)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that both directions check, the same numbers on both sides; packed pictures count as they unpack."""

    header_bytes: int = 1 << 20  # frame 0
    frame_bytes: int = 256 << 20  # any other frame; also the socket's MAXMSGSIZE
    total_bytes: int = 512 << 20  # all frames together
    frames: int = 1024  # number of frames
    depth: int = 16  # nesting of dicts and lists
    rank: int = 8  # dims of an array


DEFAULT_LIMITS = Limits()


def pack(body: dict[str, Any], limits: Limits = DEFAULT_LIMITS, pictures: str = RAW) -> Frames:
    """Frames of `body`: `[header, array bytes, ...]`; array frames are views of the given arrays, not copies.

    pictures: how arrays uint8[m, h, w, 3] are packed, `raw` (not at all), `lossless` or `jpeg:<quality>`.
    Numpy scalars become Python scalars, tuples lists, and arrays of other libraries numpy arrays. Raises TypeError for
    a value that has no form on the wire (naming its path) and TooLarge above the limits.
    """
    if not isinstance(body, dict):
        raise TypeError(f"a body is a dict, got {type(body).__name__}")
    arrays = _Packing(limits, pictures)
    header = msgpack.packb(_encode_map(body, "body", 0, arrays))
    frames = [header, *arrays.frames]
    check_sizes(frames, limits, arrays.saved)
    return frames


def unpack(frames: Sequence[Any], limits: Limits = DEFAULT_LIMITS, leave_packed: bool = False) -> dict[str, Any]:
    """The body of `frames`; arrays are read-only views of the frames. BadFrame or TooLarge for anything but a body.

    leave_packed: packed pictures stay `Packed`, for whoever does not look at them.
    """
    check_sizes(frames, limits)
    arrays = _Arrays(frames, limits, leave_packed)
    body = _unpack_header(buffer_of(frames[0]), arrays)
    if not isinstance(body, dict):
        raise BadFrame(f"a body is a dict, got {type(body).__name__}")
    _check_tree(body, limits.depth)
    return body


def check_sizes(frames: Sequence[Any], limits: Limits = DEFAULT_LIMITS, saved: int = 0) -> None:
    """Raise BadFrame without frames, TooLarge when a count or size is above `limits`.

    saved: bytes that packing has taken from them; the receiver counts what it unpacks.
    """
    if not frames:
        raise BadFrame("a body has at least a header frame, got none")
    if len(frames) > limits.frames:
        raise TooLarge(f"{len(frames)} frames, the limit is {limits.frames}")
    sizes = list(map(nbytes, frames))
    if sizes[0] > limits.header_bytes:
        raise TooLarge(f"a header of {sizes[0]} bytes, the limit is {limits.header_bytes}")
    if max(sizes) > limits.frame_bytes:
        raise TooLarge(f"a frame of {max(sizes)} bytes, the limit is {limits.frame_bytes}")
    if sum(sizes) + saved > limits.total_bytes:
        raise TooLarge(f"a message of {sum(sizes) + saved} bytes, the limit is {limits.total_bytes}")


def buffer_of(frame: Any) -> memoryview:
    """The frame's bytes as a flat view, whether it is bytes, a memoryview or a zmq.Frame."""
    view = memoryview(getattr(frame, "buffer", frame))
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


def nbytes(frame: Any) -> int:
    """Size of a frame in bytes."""
    return frame.nbytes if type(frame) is memoryview else len(frame)


@dataclass(slots=True)
class _Packing:
    """The array frames of a body in the making."""

    limits: Limits
    pictures: str
    frames: Frames = field(default_factory=list)
    saved: int = 0  # bytes, by packing pictures

    def add(self, array: np.ndarray, path: _Path) -> msgpack.ExtType:
        """A frame for one array; its descriptor."""
        shape = list(array.shape)
        if self.pictures != RAW and are_pictures(array):
            if array.nbytes > self.limits.frame_bytes:
                raise TooLarge(f"{_where(path)}: {array.nbytes} bytes, the limit is {self.limits.frame_bytes}")
            if smaller := packed(array, self.pictures):
                kind, data = smaller
                self.saved += array.nbytes - len(data)
                self.frames.append(data)
                return msgpack.ExtType(_PICTURES, msgpack.packb([kind, shape, len(self.frames)]))
        self.frames.append(array.reshape(-1).view(np.uint8).data)
        return msgpack.ExtType(_ARRAY, msgpack.packb([array.dtype.name, shape, len(self.frames)]))


def _encode(value: Any, path: _Path, depth: int, arrays: _Packing) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray):
        return _encode_array(value, path, arrays)
    if isinstance(value, np.generic):
        return _encode(value.item(), path, depth, arrays)
    if depth >= arrays.limits.depth:
        raise TooLarge(f"{_where(path)}: nested deeper than {arrays.limits.depth}")
    if isinstance(value, Mapping):
        return _encode_map(value, path, depth, arrays)
    if isinstance(value, list | tuple):
        return [_encode(item, (path, i), depth + 1, arrays) for i, item in enumerate(value)]
    if isinstance(value, _SCALARS):
        return value
    if hasattr(type(value), "__array__"):  # arrays of other libraries
        return _encode_array(np.asarray(value), path, arrays)
    raise TypeError(f"{_where(path)}: {type(value).__name__} has no form on the wire")


def _encode_map(value: Mapping[str, Any], path: _Path, depth: int, arrays: _Packing) -> dict[str, Any]:
    result = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{_where(path)}: keys are texts, got {key!r}")
        result[key] = _encode(item, (path, key), depth + 1, arrays)
    return result


def _encode_array(array: np.ndarray, path: _Path, arrays: _Packing) -> msgpack.ExtType:
    name = array.dtype.name
    if name not in DTYPES:
        raise TypeError(f"{_where(path)}: dtype {array.dtype} is not allowed on the wire, use one of {list(DTYPES)}")
    if array.ndim > arrays.limits.rank:
        raise TooLarge(f"{_where(path)}: {array.ndim} dims, the limit is {arrays.limits.rank}")
    shape = list(array.shape)
    array = np.ascontiguousarray(array, DTYPES[name]).reshape(shape)
    if array.nbytes <= INLINE_BYTES:
        return msgpack.ExtType(_INLINE, msgpack.packb([name, shape, array.tobytes()]))
    return arrays.add(array, path)


def _where(path: _Path) -> str:
    """body.a[0].b"""
    if isinstance(path, str):
        return path
    container, step = path
    return _where(container) + (f"[{step}]" if isinstance(step, int) else f".{step}")


def _unpack_header(header: memoryview, arrays: "_Arrays") -> Any:
    try:
        tree = msgpack.unpackb(
            header, raw=False, strict_map_key=True, ext_hook=arrays.resolve, object_pairs_hook=_strict_map
        )
    except WireError:
        raise
    except Exception as error:  # msgpack raises a zoo: ValueError, ExtraData, FormatError, StackError, UnicodeError
        raise BadFrame(f"the header is not msgpack: {type(error).__name__}: {error}") from None
    arrays.check_all_used()
    return tree


def _strict_map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadFrame("a map names a key twice")
    if not all(type(key) is str for key in result):
        raise BadFrame("a map's keys are texts")
    return result


def _check_tree(value: dict | list, depth: int) -> None:
    if depth <= 0:
        raise BadFrame("nested too deep")
    for item in value.values() if type(value) is dict else value:
        kind = type(item)
        if kind in _LEAVES:
            continue
        if kind is not dict and kind is not list:
            raise BadFrame(f"a {kind.__name__} is not allowed in a body")
        _check_tree(item, depth - 1)


class _Arrays:
    """Turns descriptors into views of the frames; every frame must be named exactly once."""

    def __init__(self, frames: Sequence[Any], limits: Limits, leave_packed: bool):
        self._frames = frames
        self._limits = limits
        self._leave_packed = leave_packed
        self._unpacked_bytes = sum(map(nbytes, frames))  # once all packed pictures are unpacked
        self._unused = set(range(1, len(frames)))

    def resolve(self, code: int, data: bytes) -> np.ndarray | Packed:
        """msgpack's ext_hook: the array that a descriptor names, or that lies in the header itself."""
        if code not in (_ARRAY, _INLINE, _PICTURES):
            raise BadFrame(f"unknown extension type {code}")
        name, shape, rest = self._descriptor(data)
        if code == _INLINE:
            if type(rest) is not bytes:
                raise BadFrame("an array in the header is [dtype, shape, bytes]")
            return _view(_dtype(name), shape, rest, "the header")
        if type(rest) is not int or rest not in self._unused:
            raise BadFrame(f"an array names frame {rest!r}, which does not exist or is taken")
        self._unused.discard(rest)
        frame = buffer_of(self._frames[rest]).toreadonly()
        if code == _PICTURES:
            return self._pictures(name, shape, frame)
        return _view(_dtype(name), shape, frame, f"frame {rest}")

    def _pictures(self, kind: str, shape: tuple[int, ...], frame: memoryview) -> np.ndarray | Packed:
        check_packed(kind, shape)
        found = Packed(kind, shape, frame)
        self._unpacked_bytes += found.nbytes - len(frame)
        if found.nbytes > self._limits.frame_bytes or self._unpacked_bytes > self._limits.total_bytes:
            raise TooLarge(
                f"pictures that unpack to {found.nbytes} bytes, of {self._unpacked_bytes} in all; the limits are "
                f"{self._limits.frame_bytes} and {self._limits.total_bytes}"
            )
        return found if self._leave_packed else unpacked(found)

    def check_all_used(self) -> None:
        """Raise BadFrame when a frame belongs to no array."""
        if self._unused:
            raise BadFrame(f"frame {min(self._unused)} belongs to no array")

    def _descriptor(self, data: bytes) -> tuple[str, tuple[int, ...], Any]:
        try:
            fields = msgpack.unpackb(data, use_list=False)
        except Exception as error:  # the same zoo as above
            raise BadFrame(f"an array's descriptor is not msgpack: {type(error).__name__}") from None
        if type(fields) is not tuple or len(fields) != 3:
            raise BadFrame("an array's descriptor is [dtype, shape, frame]")
        name, shape, rest = fields
        if type(name) is not str or type(shape) is not tuple or not all(type(size) is int for size in shape):
            raise BadFrame(f"a descriptor names a dtype and a list of sizes, got {fields[:2]!r:.200}")
        if len(shape) > min(self._limits.rank, _MAX_DIMS):
            raise BadFrame(f"a shape is a list of at most {min(self._limits.rank, _MAX_DIMS)} sizes")
        if not all(0 <= size < 1 << 40 for size in shape):
            raise BadFrame(f"a shape's sizes are whole numbers, got {shape}")
        return name, shape, rest


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise BadFrame(f"dtype {name!r} is not allowed")
    return DTYPES[name]


def _view(dtype: np.dtype, shape: tuple[int, ...], data: bytes | memoryview, where: str) -> np.ndarray:
    """The bytes as a read-only array. BadFrame unless there are exactly as many as dtype and shape need."""
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise BadFrame(f"{dtype.name}{list(shape)} is {expected} bytes, {where} has {len(data)}")
    array = np.ndarray(shape, dtype, data if expected else bytes(1))
    # A bool array made of other bytes would make numpy misbehave.
    if dtype == np.bool_ and expected and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise BadFrame(f"{where}: a bool is 0 or 1")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
