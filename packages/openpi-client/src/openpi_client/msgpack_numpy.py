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
    if b"__ndarray__" in value:
        dtype, shape = _dtype(value[b"dtype"]), tuple(value[b"shape"])
        expected = math.prod(shape) * dtype.itemsize
        if len(value[b"data"]) != expected:
            raise ValueError(f"expected {expected} bytes for {dtype}{list(shape)}, got {len(value[b'data'])}")
        return np.frombuffer(value[b"data"], dtype).reshape(shape)
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    return value


packb = functools.partial(msgpack.packb, default=_encode)
"""Nested dicts and lists of scalars and arrays -> bytes. ValueError or TypeError for anything else."""

unpackb = functools.partial(msgpack.unpackb, object_hook=_decode, strict_map_key=False)
"""Bytes -> what was packed; arrays are read-only views. ValueError where the bytes do not hold what they announce."""
