"""Numpy arrays in msgpack, in the form the openpi websocket protocol uses. Called by the websocket client and server.

An array is `{b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": tuple}`, a numpy scalar the same with
`__npgeneric__`. Only bool, integer and float dtypes pass, in either direction: object arrays would need pickle.
"""

import functools
import math
from typing import Any

import msgpack
import numpy as np

_KINDS = "biuf"


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in _KINDS:
            raise ValueError(f"expected an array of bool, integer or float, got dtype {value.dtype}")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"cannot pack {type(value).__name__}")


def _dtype(name: Any) -> np.dtype:
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
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a shape holds whole numbers from 0, got {shape}")
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
    """Bytes -> what was packed; arrays are read-only views. ValueError for anything else."""
    try:
        return msgpack.unpackb(data, object_hook=_decode, strict_map_key=False)
    except (msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ValueError(f"not msgpack: {type(error).__name__}: {error}") from None
