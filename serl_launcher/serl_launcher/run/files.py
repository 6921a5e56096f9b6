"""Files of a run folder: written whole beside their place, then renamed; read with a check. Every role comes here.

    write: fill <name>.part ─▶ [durable: sync it] ─▶ rename ─▶ [durable: sync the folder]; refused: the part goes
    read: read_sealed (with a checksum; damage is an error that names the file), read_json (derived; damaged is absent)

What a power cut may leave, without `durable`, is the file of before, an empty one or none. A disk that refuses to be
written may take writes again: `disk_trouble` tells that from a mistake.
"""

import errno
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EIO, errno.ESTALE)
PART = ".part"  # suffix of a file that is being written
CHECKSUM = "crc32"  # key of a sealed document: of all its other keys


class DamagedFileError(ValueError):
    """A file that cannot be used; the message names it and says what is wrong with it."""


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
    """Let `write` fill a file beside `path`, then give it that name in one step; OSError when the disk refuses.

    durable: file and name are on disk when this returns, in this order. A folder or a link in the way is put aside.
    """
    make_folder(path.parent, durable)
    part = path.with_name(path.name + PART)
    clear(part)
    try:
        write(part)
        publish(part, path, durable)
    except OSError:
        part.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise


def publish(part: Path, path: Path, durable: bool = False) -> None:
    """The second half of `write_whole`, for a file that is written over a longer time."""
    if durable:
        sync(part)
    if path.is_dir():
        clear(path)
    os.replace(part, path)
    if durable:
        sync(path.parent)


def make_folder(folder: Path, durable: bool = False) -> None:
    """Create a folder and those above it; durable: their names are on disk when this returns."""
    if folder.is_dir():
        return
    make_folder(folder.parent, durable)
    folder.mkdir(exist_ok=True)
    if durable:
        sync(folder.parent)


def clear(path: Path) -> None:
    """Put aside what lies where a file belongs and is none: a folder or a link, which is not followed. Named in the
    log."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        os.rename(path, aside)
        log.warning("%s is no file: it was moved to %s", path, aside.name)


def append_whole(descriptor: int, block: bytes) -> None:
    """Append to an open file (O_APPEND) all of these bytes or, where the disk refuses, none of them: OSError then."""
    length = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, block) < len(block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(descriptor, length)
        raise


def disk_trouble(error: OSError) -> str | None:
    """What to tell people of a write that may succeed later, because there is room again, say; None: a mistake."""
    if error.errno in FULL:
        return "the disk is full"
    return f"the disk takes no writes ({error.strerror})" if error.errno in REFUSED else None


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str, durable: bool = False, mode: int = 0o666) -> None:
    """Replace `path` by this text, as `write_whole` does. mode: of the file, less the umask, from its first byte on."""

    def write(part: Path) -> None:
        part.unlink(missing_ok=True)  # of a write that was killed, with a mode of its own
        part.touch(mode)
        part.write_text(text, encoding="utf-8")

    write_whole(path, write, durable)


def write_json(path: Path, body: Any, indent: int | None = None, durable: bool = False) -> None:
    """Replace `path` by a JSON document, as `write_whole` does."""
    write_text(path, json.dumps(body, indent=indent), durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, for what is derived; None when there is none, or no whole one."""
    try:
        return _read_object(path)
    except DamagedFileError:
        return None


def write_sealed(
    path: Path, body: Mapping[str, Any], indent: int | None = None, durable: bool = True, mode: int = 0o666
) -> None:
    """Replace `path` by a JSON document with its checksum among the keys, as `write_text` does."""
    write_text(path, json.dumps(seal(body), indent=indent), durable, mode)


def read_sealed(
    path: Path, known: Collection[str] | None = None, needed: Collection[str] = ()
) -> dict[str, Any] | None:
    """What `write_sealed` wrote, without the checksum; None when there is no file. DamagedFileError names it.

    A document without a checksum is an older release's, and is taken as it is. known, needed: the keys that it may
    have, and those that it must.
    """
    body = _read_object(path)
    if body is None:
        return None
    try:
        return unseal(body, known, needed)
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its checksum. Its keys are texts."""
    return {**body, CHECKSUM: _checksum(body)}


def unseal(
    body: Mapping[str, Any], known: Collection[str] | None = None, needed: Collection[str] = ()
) -> dict[str, Any]:
    """The document without its checksum, compared; ValueError: it does not match, a key is unknown or missing."""
    inside = {key: value for key, value in body.items() if key != CHECKSUM}
    if body.get(CHECKSUM, _checksum(inside)) != _checksum(inside):
        raise ValueError(f"its content does not match its {CHECKSUM}")
    if unknown := sorted(inside.keys() - set(inside if known is None else known)):
        raise ValueError(f"unknown key {unknown[0]!r}")
    if missing := sorted(set(needed) - inside.keys()):
        raise ValueError(f"key {missing[0]!r} is missing")
    return inside


def _checksum(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise DamagedFileError(f"{path} is damaged: it holds no JSON object")
    return body
