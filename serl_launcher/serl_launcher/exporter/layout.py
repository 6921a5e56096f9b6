"""Where the files of an exported dataset lie.

Commit k of the exporter owns one data file, one episodes file and one mp4 per camera, all numbered k.
"""

from pathlib import Path

FILES_PER_CHUNK = 1000
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{_FILE}.mp4"
EPISODES_PATH = f"meta/episodes/{_FILE}.parquet"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"


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
