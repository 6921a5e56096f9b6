"""Pictures packed for wire, spool and journal: every pixel kept, or as JPEG at a chosen quality.

    TrainerClient.send_item ─▶ codec.pack ─▶ packed(array, how) ─▶ frame ─▶ codec.unpack ─▶ unpacked(Packed) ─▶ array

Pictures are the arrays uint8[m, h, w, 3] of a body, m pictures of one camera in their order. Where every pixel is kept,
each picture is written as its difference to the one before (`time`), or each row as its difference to the row above
(`rows`), whichever is smaller, modulo 256, and Zstandard packs that: a simulator's pictures hardly change, and of a
camera's only the sensor's noise is left. What does not get smaller is not packed. `jpeg:<quality>` keeps the colours'
resolution (4:4:4); its pictures are not those that the camera gave.
"""

import io
import struct
from collections.abc import Sequence

import numpy as np
from backports import zstd

from serl_transport.contract.errors import BadFrame
from serl_transport.contract.packed import Packed

RAW, LOSSLESS, JPEG = "raw", "lossless", "jpeg:"
LEVEL = 1  # of Zstandard: level 3 packs noise five times as slowly and no smaller
_TIME, _ROWS = "time", "rows"
_EVERY = 4  # rows of which one is looked at to choose between the two


def check_pictures(label: str, how: object) -> str:
    """`how` if pictures can be packed that way; ValueError otherwise."""
    if how in (RAW, LOSSLESS) or (isinstance(how, str) and _quality(how) is not None):
        return str(how)
    raise ValueError(f"{label}: expected lossless, raw or jpeg:<quality from 1 to 100>, got {how!r}")


def are_pictures(array: np.ndarray) -> bool:
    """Is it uint8[m, h, w, 3]?"""
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3 and array.size > 0


def packed(array: np.ndarray, how: str) -> tuple[str, bytes] | None:
    """(kind, bytes) of uint8[m, h, w, 3]; None where that is not smaller than the array itself."""
    if how.startswith(JPEG):
        kind, data = how, _to_jpeg(array, int(how.removeprefix(JPEG)))
    else:
        kind = _steadier(array)
        data = zstd.compress(_differences(array, kind).reshape(-1).data, LEVEL)
    return (kind, data) if len(data) < array.nbytes else None


def unpacked(packed: Packed) -> np.ndarray:
    """The array uint8[m, h, w, 3], read-only. BadFrame for bytes that are no such pictures."""
    exact = packed.kind in (_TIME, _ROWS)
    result = _summed(_decompressed(packed), packed.kind) if exact else _from_jpeg(packed)
    result.flags.writeable = False
    return result


def lossy(kind: str) -> bool:
    """Were pixels changed?"""
    return kind.startswith(JPEG)


def check_packed(kind: str, shape: Sequence[int]) -> None:
    """BadFrame for a kind or a shape that no pictures have."""
    if kind not in (_TIME, _ROWS) and _quality(kind) is None:
        raise BadFrame(f"pictures packed as {kind!r:.40}: this release knows time, rows and jpeg:<quality>")
    if len(shape) != 4 or shape[-1] != 3 or not all(shape):
        raise BadFrame(f"packed pictures are [m, h, w, 3], got {list(shape)}")


def _quality(how: str) -> int | None:
    text = how.removeprefix(JPEG)
    fits = how.startswith(JPEG) and text.isascii() and text.isdigit() and len(text) <= 3 and text[0] != "0"
    return int(text) if fits and int(text) <= 100 else None


def _steadier(array: np.ndarray) -> str:
    """Which differences are smaller, by some rows of the picture in the middle."""
    middle = len(array) // 2
    if not middle:
        return _ROWS
    picture, before = array[middle], array[middle - 1]
    in_time = _size(picture[1::_EVERY] - before[1::_EVERY])
    above = picture[: len(picture) - 1 : _EVERY]
    in_rows = _size(picture[1::_EVERY][: len(above)] - above)
    return _ROWS if in_rows < in_time else _TIME


def _size(differences: np.ndarray) -> float:
    """Mean size of differences modulo 256."""
    return float(np.minimum(differences, -differences).mean()) if differences.size else 0.0


def _differences(array: np.ndarray, kind: str) -> np.ndarray:
    result = np.empty_like(array, order="C")
    rows = len(array) if kind == _ROWS else 1  # the first picture has none before it
    result[:rows, 0] = array[:rows, 0]
    np.subtract(array[:rows, 1:], array[:rows, :-1], out=result[:rows, 1:])
    np.subtract(array[rows:], array[rows - 1 : -1], out=result[rows:])
    return result


def _summed(differences: np.ndarray, kind: str) -> np.ndarray:
    """Undoes `_differences`, picture by picture: numpy's own accumulate is twenty times as slow here."""
    result = np.empty_like(differences)
    rows = len(result) if kind == _ROWS else 1
    result[:rows, 0] = differences[:rows, 0]
    for y in range(1, result.shape[1]):
        np.add(differences[:rows, y], result[:rows, y - 1], out=result[:rows, y])
    for i in range(rows, len(result)):
        np.add(differences[i], result[i - 1], out=result[i])
    return result


def _decompressed(packed: Packed) -> np.ndarray:
    unpacker = zstd.ZstdDecompressor()
    try:
        data = unpacker.decompress(packed.data, packed.nbytes + 1)  # one byte more would be one too many
    except (zstd.ZstdError, EOFError) as error:
        raise BadFrame(f"packed pictures: {error}") from None
    if len(data) != packed.nbytes or not unpacker.eof or unpacker.unused_data:
        raise BadFrame(f"packed pictures of {list(packed.shape)}: expected exactly {packed.nbytes} bytes in them")
    return np.frombuffer(data, np.uint8).reshape(packed.shape)


def _to_jpeg(array: np.ndarray, quality: int) -> bytes:
    """[m lengths, u32 | m JPEG files]."""
    from PIL import Image  # here: everything imports the codec, and few choose JPEG

    files = []
    for picture in array:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=0)
        files.append(file.getvalue())
    return struct.pack(f"<{len(files)}I", *map(len, files)) + b"".join(files)


def _from_jpeg(packed: Packed) -> np.ndarray:
    from PIL import Image

    m, h, w, _ = packed.shape
    result, at = np.empty(packed.shape, np.uint8), 4 * m
    sizes = struct.unpack_from(f"<{m}I", packed.data) if len(packed.data) >= at else ()
    if not sizes or at + sum(sizes) != len(packed.data):
        raise BadFrame(f"packed pictures: {len(packed.data)} bytes are not {m} JPEG files")
    for picture, size in zip(result, sizes, strict=True):
        try:
            with Image.open(io.BytesIO(packed.data[at : at + size]), formats=["JPEG"]) as image:
                found = (image.height, image.width, image.mode)
                if found == (h, w, "RGB"):  # before its pixels are read: a small file may claim a large picture
                    picture[:] = np.asarray(image)
        except Exception as error:  # Pillow raises a zoo: OSError, SyntaxError, ValueError, struct.error
            raise BadFrame(f"packed pictures: no JPEG: {type(error).__name__}") from None
        if found != (h, w, "RGB"):
            raise BadFrame(f"packed pictures: expected RGB of {h}x{w}, got {found[2]} of {found[0]}x{found[1]}")
        at += size
    return result
