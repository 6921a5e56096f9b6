"""Where the files of an exported dataset lie, and how they are written so that no reader sees half a file.

Commit k of the exporter owns one data file, one episodes file and one mp4 per camera, all numbered k. A file is written
under a temporary name, flushed to disk and renamed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES_PER_CHUNK = 1000
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{_FILE}.mp4"
EPISODES_PATH = f"meta/episodes/{_FILE}.parquet"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
TEMPORARY = ".tmp"  # suffix of a file that is being written; recovery removes what a kill left behind


def place(template: str, commit: int, **names: str) -> str:
    """The path of commit `commit`'s file, relative to the dataset."""
    return template.format(chunk_index=commit // FILES_PER_CHUNK, file_index=commit % FILES_PER_CHUNK, **names)


def address(prefix: str, commit: int) -> dict[str, int]:
    """Where an episodes file says that commit `commit`'s file lies: `<prefix>/chunk_index`, `<prefix>/file_index`."""
    chunk, file = divmod(commit, FILES_PER_CHUNK)
    return {f"{prefix}/chunk_index": chunk, f"{prefix}/file_index": file}


def commit_of(path: Path) -> int:
    """The commit that owns `.../chunk-CCC/file-FFF.*`."""
    return int(path.parent.name.removeprefix("chunk-")) * FILES_PER_CHUNK + int(path.stem.removeprefix("file-"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then publish it under `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    write(temporary)
    publish(temporary, path)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document whole."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(document, indent=2), encoding="utf-8"))


def publish(temporary: Path, path: Path) -> None:
    """Flush `temporary` to disk, give it its name, and flush the folder that now names it."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
