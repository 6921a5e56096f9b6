"""Numpy arrays in msgpack, in the form the openpi websocket protocol uses. Called by the websocket client and server.

An array is `{b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": tuple}`, a numpy scalar the same with
`__npgeneric__`. Only bool, integer and float dtypes pass, in either direction: object arrays would need pickle.
A message has a bounded number of elements, so that reading one takes no longer than its bytes are worth.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

_KINDS = "biuf"
ELEMENTS = 10_000  # entries of maps and lists in one message, an array counting as one
_DTYPE_CHARACTERS, _DIMS = 16, 8


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in _KINDS:
            raise ValueError(f"expected an array of bool, integer or float, got dtype {value.dtype}")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"cannot pack {type(value).__name__}")


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str | bytes) or len(name) > _DTYPE_CHARACTERS:
        raise ValueError(f"a dtype is a text of at most {_DTYPE_CHARACTERS} characters, got {type(name).__name__}")
    dtype = np.dtype(name.decode() if isinstance(name, bytes) else name)
    if dtype.kind not in _KINDS or dtype.subdtype is not None or dtype.fields is not None:
        raise ValueError(f"expected an array of bool, integer or float, got dtype {dtype}")
    return dtype


def _decode(value: dict) -> Any:
    try:
        return _decode_map(value)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, OverflowError, SyntaxError) as error:
        raise ValueError(f"a malformed array: {type(error).__name__}: {error}") from None


def _decode_map(value: dict) -> Any:
    if b"__ndarray__" in value:
        dtype, shape = _dtype(value[b"dtype"]), tuple(value[b"shape"])
        if len(shape) > _DIMS or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a shape holds at most {_DIMS} whole numbers from 0, got {repr(shape)[:80]}")
        expected = math.prod(shape) * dtype.itemsize
        if len(value[b"data"]) != expected:
            raise ValueError(f"expected {expected} bytes for {dtype}{list(shape)}, got {len(value[b'data'])}")
        return np.frombuffer(value[b"data"], dtype).reshape(shape)
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    return value


packb = functools.partial(msgpack.packb, default=_encode)
"""Nested dicts and lists of scalars and arrays -> bytes. ValueError or TypeError for anything else."""


def unpackb(data: bytes) -> Any:
    """Bytes -> what was packed; arrays are read-only views. ValueError for anything else, or more than ELEMENTS."""
    return unpack_bounded(data, _decode)


def unpack_bounded(data: bytes, decode: Callable[[dict], Any], strict_map_key: bool = False) -> Any:
    """msgpack of any protocol of clients, `decode` called with each map. ValueError, also for more than ELEMENTS."""
    left = ELEMENTS

    def counted(container: Any) -> Any:
        nonlocal left
        left -= 1 + len(container)
        if left < 0:
            raise ValueError(f"more than {ELEMENTS} elements")
        return container

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda found: decode(counted(found)),
            list_hook=counted,
            strict_map_key=strict_map_key,
            max_array_len=ELEMENTS,
            max_map_len=ELEMENTS,
            max_ext_len=0,
        )
    except (msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ValueError(f"not msgpack: {type(error).__name__}: {error}") from None
