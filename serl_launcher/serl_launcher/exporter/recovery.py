"""Finding out what an exported dataset holds, and making it consistent after a kill or a damaged file.

Called by the dataset writer when it opens a folder. Commits are checked in order: a commit counts while its episodes
file, data file and mp4s are whole and continue the one before. The first that does not ends the dataset; it and all
after it are removed, and the exporter takes those episodes from the journal again. info.json, stats.json and
tasks.parquet are derived and written anew when they do not fit.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serl_launcher.exporter.features import CODEBASE_VERSION, ORDINAL, dataset_features, frame_rate, image_keys
from serl_launcher.exporter.layout import (
    DATA_PATH,
    FILES_PER_CHUNK,
    INFO_PATH,
    STATS_PATH,
    TASKS_PATH,
    TEMPORARY,
    VIDEO_PATH,
    commit_of,
    place,
    write_json,
    write_whole,
)
from serl_launcher.exporter.statistics import Stats, merge
from serl_transport.contract.specs import TaskSpec

_log = logging.getLogger(__name__)
_PANDAS_COLUMNS = (("task_index", "int64", "int64"), ("task", "unicode", "object"))


class UnusableDataset(RuntimeError):  # noqa: N818
    """The folder cannot be continued; it has to be rebuilt from the journal. The message says why."""


@dataclass(slots=True)
class DatasetState:
    """What the committed part of a dataset holds."""

    commits: int = 0  # number of the next commit
    episodes: int = 0  # finished episodes written
    frames: int = 0  # rows written
    last_ordinal: int = -1  # journal ordinal of the newest episode; -1: none
    last_episode_id: str = ""  # its id: tells whether this dataset belongs to this journal
    tasks: list[str] = field(default_factory=list)  # prompts; the position is the task_index
    stats: dict[str, Stats] = field(default_factory=dict)  # statistics of everything written


def info_document(spec: TaskSpec, video: bool, state: DatasetState) -> dict[str, Any]:
    """meta/info.json."""
    return {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": spec.name,
        "fps": frame_rate(spec),
        "features": dataset_features(spec, video),
        "total_episodes": state.episodes,
        "total_frames": state.frames,
        "total_tasks": len(state.tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if video else None,
        "splits": {"train": f"0:{state.episodes}"},
    }


def stats_document(state: DatasetState) -> dict[str, dict[str, list]]:
    """meta/stats.json."""
    return {key: {name: value.tolist() for name, value in stats.items()} for key, stats in state.stats.items()}


def write_tasks(root: Path, tasks: list[str]) -> None:
    """meta/tasks.parquet: a pandas frame indexed by the prompt, written without pandas."""
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in _PANDAS_COLUMNS
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.3.3"}
    schema = pa.schema(
        [("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas).encode()}
    )
    table = pa.table({"task_index": list(range(len(tasks))), "task": tasks}, schema=schema)
    write_whole(root / TASKS_PATH, lambda path: pq.write_table(table, path))


def write_derived(root: Path, spec: TaskSpec, video: bool, state: DatasetState) -> None:
    """stats.json, then info.json: the counts a reader starts from come last when a dataset grows."""
    write_json(root / STATS_PATH, stats_document(state))
    write_json(root / INFO_PATH, info_document(spec, video, state))


def recover(root: Path, spec: TaskSpec, video: bool) -> DatasetState:
    """Make the dataset at `root` consistent and return what it holds; an absent or empty folder is an empty dataset.

    Raises UnusableDataset when its features are not this task's, or when nothing tells what it is.
    """
    numbered = sorted(root.glob("meta/episodes/chunk-*/file-*.parquet"), key=commit_of)
    if not numbered and not (root / INFO_PATH).exists():
        _remove_from(root, 0)
        return DatasetState()
    info = _read_info(root, spec, video)
    state, rows = DatasetState(), []
    for commit, path in enumerate(numbered):
        try:
            batch = _read_commit(root, path, commit, spec, video, state)
        except (OSError, ValueError, pa.ArrowException) as error:
            _log.warning("dataset: commit %d is damaged (%s); keeping the %d before it", commit, error, commit)
            break
        rows.append(batch)
        state.commits += 1
        state.episodes += len(batch)
        state.frames += sum(row["length"] for row in batch)
        state.last_ordinal, state.last_episode_id = batch[-1]["episode_ordinal"], batch[-1]["episode_id"]
    state.tasks = _read_tasks(root, rows)
    state.stats = merge(_row_stats(row) for batch in rows for row in batch)
    if info != info_document(spec, video, state) or not _same_counts(_read_json(root / STATS_PATH), state):
        write_derived(root, spec, video, state)
    _remove_from(root, state.commits)
    return state


def _read_info(root: Path, spec: TaskSpec, video: bool) -> dict[str, Any] | None:
    """info.json, or None when it is torn (it is derived); its features must be this task's."""
    info = _read_json(root / INFO_PATH)
    features = info.get("features") if isinstance(info, dict) else None
    if not isinstance(features, dict):
        return None
    wanted = dataset_features(spec, video)
    if features != wanted:
        keys = sorted(key for key in set(features) | set(wanted) if features.get(key) != wanted.get(key))
        raise UnusableDataset(f"{root} was written for other features: {', '.join(keys)}")
    return info


def _read_json(path: Path) -> Any:
    """A JSON document, or None when it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _same_counts(document: Any, state: DatasetState) -> bool:
    """Does a stats document cover exactly the rows of `state`?"""
    wanted = {key: stats["count"] for key, stats in stats_document(state).items()}
    return isinstance(document, dict) and {key: stats.get("count") for key, stats in document.items()} == wanted


def _read_commit(
    root: Path, path: Path, commit: int, spec: TaskSpec, video: bool, before: DatasetState
) -> list[dict[str, Any]]:
    """The episode rows of one commit, after comparing them with its data file and the state before it."""
    if commit_of(path) != commit:
        raise ValueError(f"expected commit {commit}, found {path.name}")
    rows = pq.read_table(path).to_pylist()
    data = pq.read_table(root / place(DATA_PATH, commit), columns=["index", "episode_index", ORDINAL])
    ordinals = [row["episode_ordinal"] for row in rows]
    lengths = [row["length"] for row in rows]
    if not rows or ordinals != sorted(set(ordinals)) or ordinals[0] <= before.last_ordinal:
        raise ValueError(f"episode ordinals {ordinals} do not continue {before.last_ordinal}")
    expected = {
        "index": before.frames + np.arange(sum(lengths)),
        "episode_index": before.episodes + np.repeat(np.arange(len(rows)), lengths),
        ORDINAL: np.repeat(ordinals, lengths),
    }
    for key, values in expected.items():
        if not np.array_equal(data[key].to_numpy(), values):
            raise ValueError(f"column {key} of its data file does not match its episodes")
    for key in image_keys(spec) if video else ():
        if not (root / place(VIDEO_PATH, commit, video_key=key)).stat().st_size:
            raise ValueError(f"the video of {key} is empty")
    return rows


def _read_tasks(root: Path, rows: list[list[dict[str, Any]]]) -> list[str]:
    """The prompts in task_index order, which is the order of first use; a torn tasks.parquet is written again."""
    used = list(dict.fromkeys(task for batch in rows for row in batch for task in row["tasks"]))
    try:
        known = pq.read_table(root / TASKS_PATH).sort_by("task_index")["task"].to_pylist()
    except (OSError, pa.ArrowException):
        known = []
    if known[: len(used)] != used:
        write_tasks(root, used)
        return used
    return known


def _row_stats(row: dict[str, Any]) -> dict[str, Stats]:
    stats: dict[str, Stats] = {}
    for column, value in row.items():
        if column.startswith("stats/"):
            key, name = column.removeprefix("stats/").rsplit("/", 1)
            stats.setdefault(key, {})[name] = np.array(value)
    return stats


def _remove_from(root: Path, commit: int) -> None:
    """Delete the files of `commit` and later ones, episodes files first, and everything temporary."""
    for path in _files(root):
        if path.name.endswith(TEMPORARY) or (path.name.startswith("file-") and commit_of(path) >= commit):
            path.unlink()


def _files(root: Path) -> Iterator[Path]:
    for folder in ("meta", "data", "videos"):
        yield from sorted(path for path in (root / folder).rglob("*") if path.is_file())
