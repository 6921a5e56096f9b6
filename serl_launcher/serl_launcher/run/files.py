"""Files that other processes read while they change: written beside, then renamed. Every role writes them so."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PART = ".part"  # suffix of a file that is being written


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
    """Let `write` fill a file beside `path`, then give it that name in one step; OSError when the disk refuses.

    durable: file and name are on disk when this returns, in this order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    write(part)
    publish(part, path, durable)


def publish(part: Path, path: Path, durable: bool = False) -> None:
    """The second half of `write_whole`, for a file that is written over a longer time."""
    if durable:
        sync(part)
    os.replace(part, path)
    if durable:
        sync(path.parent)


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
