"""Files that other processes read while they change: written beside, then renamed. Every role writes them so.

A disk that refuses to be written may take writes again: `disk_trouble` tells that from a mistake.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EIO, errno.ESTALE)
PART = ".part"  # suffix of a file that is being written


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
    """Let `write` fill a file beside `path`, then give it that name in one step; OSError when the disk refuses.

    durable: file and name are on disk when this returns, in this order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
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
    os.replace(part, path)
    if durable:
        sync(path.parent)


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


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Replace `path` by this text, as `write_whole` does."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"), durable)


def write_json(path: Path, body: Any, indent: int | None = None, durable: bool = False) -> None:
    """Replace `path` by a JSON document, as `write_whole` does."""
    write_text(path, json.dumps(body, indent=indent), durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is none, or (after a power cut) half of one."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return body if isinstance(body, dict) else None
