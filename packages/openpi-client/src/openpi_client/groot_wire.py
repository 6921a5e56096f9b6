"""GR00T's messages: msgpack with arrays as .npy files. Used by both ends of its ZMQ protocol; no numpy file is opened.

    request   {"endpoint": str, "data": {…}, "api_token": str}        answer   anything, or {"error": str}
    array     {"__ndarray_class__": True, "as_npy": bytes}
    modality  {"__ModalityConfig_class__": True, "as_json": {…}}      as a JSON text in GR00T N1.5

A .npy header is read by a pattern and its bytes are counted before anything is allocated; pickle is in no path.
Facts from Isaac-GR00T, gr00t/policy/server_client.py (N1.6, N1.7) and gr00t/eval/service.py (N1.5).
"""

import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from openpi_client.msgpack_numpy import unpack_bounded

_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[biufU]\d{1,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d+, ?)*(?:\d+)?,?)\),? ?\}\s*"
)
_HEADER_BYTES, _DIMS, _TEXTS = 1024, 8, 64


@dataclass(frozen=True, slots=True)
class ModalityConfig:
    """Which keys of a modality (video, state, action, language) a policy reads or gives, and at which ticks."""

    delta_indices: list[int]
    modality_keys: list[str]
    as_text: bool = False  # GR00T N1.5's form

    def encoded(self) -> dict[str, Any]:
        """As it stands in a message."""
        content = {"delta_indices": self.delta_indices, "modality_keys": self.modality_keys}
        return {"__ModalityConfig_class__": True, "as_json": json.dumps(content) if self.as_text else content}


def packb(body: Any) -> bytes:
    """Nested dicts and lists of scalars, texts and arrays to bytes. ValueError or TypeError for anything else."""
    return msgpack.packb(body, default=_encode)


def unpackb(data: bytes) -> Any:
    """Bytes to what was packed; arrays are read-only views, arrays of texts lists of them. ValueError for anything
    else, or for a message of too many elements."""
    return unpack_bounded(data, _decode, strict_map_key=True)


def _encode(value: Any) -> Any:
    if isinstance(value, ModalityConfig):
        return value.encoded()
    if isinstance(value, np.ndarray):
        out = io.BytesIO()
        np.save(out, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": out.getvalue()}
    raise TypeError(f"cannot pack {type(value).__name__}")


def _decode(value: dict) -> Any:
    if "__ndarray_class__" in value:
        return _array(value.get("as_npy"))
    if "__ModalityConfig_class__" in value:
        return _modality(value.get("as_json"))
    return value


def _array(raw: Any) -> Any:
    """The array of a .npy file's bytes; a list where it holds texts."""
    if not isinstance(raw, bytes) or raw[:6] != _MAGIC or len(raw) < 12:
        raise ValueError("a malformed array: no .npy file")
    start = 10 if raw[6] == 1 else 12
    end = start + int.from_bytes(raw[8:start], "little")
    if end - start > _HEADER_BYTES or not (header := _HEADER.fullmatch(raw[start:end])):
        raise ValueError("a malformed array: expected a .npy header of bool, integer, float or text")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(size) for size in header[3].split(b",") if size.strip())
    expected = math.prod(shape) * dtype.itemsize
    if dtype.kind == "U" and math.prod(shape) > _TEXTS:
        raise ValueError(f"a malformed array: more than {_TEXTS} texts")
    if len(shape) > _DIMS or len(raw) - end != expected:
        raise ValueError(f"a malformed array: expected {expected} bytes for {dtype}{list(shape)}, got {len(raw) - end}")
    order = "F" if header[2] == b"True" else "C"
    array = np.frombuffer(raw, dtype, offset=end).reshape(shape, order=order)
    return _texts(array) if dtype.kind == "U" else array


def _texts(array: np.ndarray) -> Any:
    codes = np.frombuffer(array.tobytes(), np.dtype("u4").newbyteorder(array.dtype.byteorder))
    if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
        raise ValueError("a malformed array: its texts are no characters")
    return array.tolist()


def _modality(content: Any) -> ModalityConfig:
    as_text = isinstance(content, str)
    if as_text:
        try:
            content = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"a malformed modality config: {error}") from None
    deltas, keys = (
        content.get(name) if isinstance(content, dict) else None for name in ("delta_indices", "modality_keys")
    )
    if not _list_of(deltas, int) or not _list_of(keys, str):
        raise ValueError("a malformed modality config: expected lists delta_indices and modality_keys")
    return ModalityConfig(deltas, keys, as_text)


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
