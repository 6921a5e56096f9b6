"""The numbers of a dataset: state, action, rewards, prompts and episodes, all of them, checked; pictures stay on disk.

    meta/tasks.parquet, meta/episodes/*, data/* ─▶ read_table ─▶ Table

Everything that is missing, torn or no number is named by file, episode and frame before anybody trains or writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from serl_launcher.datasets.columns import Columns, Parts
from serl_launcher.datasets.folder import DatasetError, read_parquet

OUTCOMES = ("next.reward", "next.success", "intervention")  # columns that a dataset may have, a number or a flag a row
SAID = ("success", "mode")  # of an episode, where this project's exporter wrote it
PLACE = ["episode_index", "frame_index", "task_index", "timestamp"]


@dataclass(frozen=True, slots=True)
class EpisodePlace:
    """One episode: its rows, where they lie, and what is said of it."""

    index: int  # LeRobot's episode_index
    first: int  # row
    end: int  # the row after its last one
    file: Path  # of its numbers
    videos: Mapping[str, tuple[Path, float]]  # column -> file, and the time in it at which the episode begins, s
    said: Mapping[str, Any]  # `success` and `mode` where they are told

    def __len__(self) -> int:
        return self.end - self.first

    def where(self, row: int) -> str:
        """`file, episode e, frame f` of a row of the dataset."""
        return f"{self.file}, episode {self.index}, frame {row - self.first}"


@dataclass(frozen=True, slots=True)
class Table:
    """Every row's numbers."""

    state: np.ndarray  # float32[rows, s], physical units
    action: np.ndarray  # float32[rows, ad]
    prompt: np.ndarray  # int64[rows], place in `prompts`
    timestamp: np.ndarray  # float64[rows], s from the episode's beginning
    outcomes: Mapping[str, np.ndarray]  # those of OUTCOMES that are there: float32[rows] or bool[rows]
    prompts: list[str]
    episodes: list[EpisodePlace]


def read_table(folder: Path, info: Mapping[str, Any], columns: Columns) -> Table:
    """Raises DatasetError for the first thing that is missing or no number."""
    episodes = _episodes(folder, info)
    files = sorted({episode.file for episode in episodes})
    outcomes = [key for key in OUTCOMES if key in info["features"]]
    keys = sorted({key for key, _ in (*columns.state, *columns.action)})
    for key in keys:
        if key not in info["features"]:
            raise DatasetError(f"{folder}: no column {key!r}; it has {sorted(info['features'])}")
    tables = [read_parquet(file, [*keys, *PLACE, *outcomes]) for file in files]
    rows = pa.concat_tables([table.select(PLACE) for table in tables])
    place = {name: rows[name].to_numpy() for name in PLACE}
    _check_rows(folder, episodes, place)
    values = {key: np.concatenate([_matrix(f, key, t) for f, t in zip(files, tables, strict=True)]) for key in keys}
    for key in keys:
        _check_finite(key, values[key], episodes)
    told = {
        key: np.concatenate([_matrix(f, key, t)[:, 0] for f, t in zip(files, tables, strict=True)]) for key in outcomes
    }
    prompts = _prompts(folder)
    _check_prompts(prompts, place["task_index"], episodes)
    return Table(
        _joined(values, columns.state),
        _joined(values, columns.action),
        place["task_index"].astype(np.int64),
        place["timestamp"].astype(np.float64),
        told,
        prompts,
        episodes,
    )


def _episodes(folder: Path, info: Mapping[str, Any]) -> list[EpisodePlace]:
    files = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise DatasetError(f"{folder / 'meta' / 'episodes'}: no parquet file; is the dataset copied whole?")
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    found = [_episode(folder, info, videos, row) for file in files for row in _rows(file)]
    if not found:
        raise DatasetError(f"{folder}: the dataset holds no episodes")
    found.sort(key=lambda episode: episode.first)
    ends = [0, *(episode.end for episode in found)]
    for episode, end in zip(found, ends, strict=False):
        if episode.first != end or not len(episode):
            raise DatasetError(
                f"{folder}: episode {episode.index} has rows {episode.first} to {episode.end}, expected them from {end}"
            )
    told = info.get("total_frames")
    if told is not None and told != ends[-1]:
        raise DatasetError(
            f"{folder}: meta/info.json counts {told} frames, meta/episodes {ends[-1]}: copied while it grew?"
        )
    for file in sorted({file for e in found for file in (e.file, *(video for video, _ in e.videos.values()))}):
        if not file.is_file():
            raise DatasetError(f"{file} is missing")
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    table = read_parquet(file)
    return table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()


def _episode(folder: Path, info: Mapping[str, Any], videos: list[str], row: Mapping[str, Any]) -> EpisodePlace:
    try:
        chunk = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        file = folder / info["data_path"].format(**chunk)
        places = {}
        for key in videos:
            chunk = {"chunk_index": row[f"videos/{key}/chunk_index"], "file_index": row[f"videos/{key}/file_index"]}
            path = folder / info["video_path"].format(video_key=key, **chunk)
            places[key] = (path, float(row[f"videos/{key}/from_timestamp"]))
        said = {key: row[key] for key in SAID if row.get(key) is not None}
        ends = int(row["dataset_from_index"]), int(row["dataset_to_index"])
        return EpisodePlace(int(row["episode_index"]), *ends, file, places, said)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{folder}: meta/episodes or meta/info.json lacks what LeRobot v3 has: {error!r}") from None


def _check_rows(folder: Path, episodes: list[EpisodePlace], place: Mapping[str, np.ndarray]) -> None:
    total = len(place["episode_index"])
    if total != episodes[-1].end:
        raise DatasetError(f"{folder}: meta/episodes counts {episodes[-1].end} frames, the files in data/ hold {total}")
    for episode in episodes:
        rows = slice(episode.first, episode.end)
        expected = np.arange(len(episode))
        wrong = (place["episode_index"][rows] != episode.index) | (place["frame_index"][rows] != expected)
        if wrong.any():
            row = episode.first + int(wrong.argmax())
            got = f"{place['episode_index'][row]}/{place['frame_index'][row]}"
            raise DatasetError(f"{episode.where(row)}: the row says episode/frame {got}")


def _matrix(file: Path, key: str, table: pa.Table) -> np.ndarray:
    """float32[rows, dims] of a column of lists, or of single numbers."""
    column = table[key].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # none or one chunk
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise DatasetError(f"{file}: column {key!r} has {column.null_count} empty cells")
    lists = (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    )
    values = column.flatten() if lists else column
    try:
        flat = values.to_numpy(zero_copy_only=False).astype(np.float32)
    except (ValueError, TypeError):
        raise DatasetError(f"{file}: column {key!r} holds {column.type}, expected numbers") from None
    if len(column) and len(flat) % len(column):
        raise DatasetError(f"{file}: column {key!r} has rows of different lengths")
    return flat.reshape(len(column), -1)


def _check_finite(key: str, values: np.ndarray, episodes: list[EpisodePlace]) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return
    row, dim = bad[0].tolist()
    episode = next(e for e in episodes if row < e.end)
    more = len(np.unique(bad[:, 0]))
    raise DatasetError(
        f"{episode.where(row)}: {key} holds {values[row, dim]} in dim {dim}"
        + (f", and {more - 1} more rows hold such values" if more > 1 else "")
        + ": mend or remove that episode"
    )


def _joined(values: Mapping[str, np.ndarray], parts: Parts) -> np.ndarray:
    return np.concatenate([values[key][:, part] for key, part in parts], axis=1)


def _prompts(folder: Path) -> list[str]:
    """Task texts in the order of task_index, each on one line."""
    path = folder / "meta" / "tasks.parquet"
    try:
        tasks = pd.read_parquet(path).sort_values("task_index")
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if tasks["task_index"].tolist() != list(range(len(tasks))):
        raise DatasetError(f"{path}: expected task_index from 0 on, got {tasks['task_index'].tolist()[:8]}")
    return [" ".join(str(text).split()) for text in tasks.index]


def _check_prompts(prompts: list[str], places: np.ndarray, episodes: list[EpisodePlace]) -> None:
    outside = np.flatnonzero((places < 0) | (places >= len(prompts)))
    if len(outside):
        row = int(outside[0])
        episode = next(e for e in episodes if row < e.end)
        raise DatasetError(f"{episode.where(row)}: task_index {places[row]}, meta/tasks.parquet has {len(prompts)}")
