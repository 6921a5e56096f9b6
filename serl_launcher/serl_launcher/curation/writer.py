"""One LeRobotDataset v3 of chosen episodes, from one source or several. tools/edit_dataset.py calls `write`.

    chosen episodes ─▶ data files (few large ones) ─▶ mp4 files, copied whole ─▶ episodes, tasks, statistics, info
                                                                              ─▶ checked (curation.check) ─▶ OUT

LeRobot's own tools (delete_episodes, split_dataset of 0.6.1) keep of meta/episodes only tasks and lengths, so that
success, mode, stage and actor are lost, and encode a mp4 anew, lossily, when it holds an episode that is dropped. Here
every column stays and every number and picture is the source's, bit for bit. An mp4 goes whole: frames of dropped
episodes stay in it, which nothing refers to; `Written.unused` counts them.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serl_launcher.curation.rows import OUTCOME, RENUMBERED, Renaming, SourceRows, episode_rows
from serl_launcher.curation.sources import EpisodeFacts, Opened, read_modality
from serl_launcher.curation.statistics import Collected
from serl_launcher.datasets.folder import DatasetError
from serl_launcher.exporter.layout import DATA_PATH, EPISODES_PATH, FILES_PER_CHUNK, VIDEO_PATH, address, place
from serl_launcher.exporter.metadata import write_tasks
from serl_launcher.exporter.statistics import vector_stats
from serl_launcher.run.data_record import dataset_digest
from serl_launcher.run.files import write_json, write_sealed
from serl_launcher.run.record import EXPORTED_ORIGIN, libraries, user
from serl_launcher.run.revision import revision

FILE_BYTES = 64 << 20  # of rows in memory; then a data file is written
INFO_OF_DATA = ("names", "dtype", "shape")  # of a feature: what must be the same in all sources


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    episodes: int
    frames: int
    tasks: list[str]
    unused: int  # frames in the mp4 files that no episode refers to


def write(
    out: Path, sources: Sequence[Opened], chosen: Sequence[EpisodeFacts], renaming: Renaming, words: str
) -> Written:
    """The chosen episodes in this order, into a folder that must not exist yet. words: of the command, for the record.

    Raises ValueError naming what differs between the sources, or DatasetError.
    """
    _check_alike(sources)
    tasks = list(dict.fromkeys(renaming(text) for one in chosen for text in one.prompts))
    renaming.check([text for one in chosen for text in one.prompts])
    collected = Collected(sources[0].features, sources[0].pictures)
    rows = [*_write_data(out, sources, chosen, tasks, renaming, collected)]
    unused = _copy_videos(out, sources, chosen, rows)
    _write_episodes(out, rows)
    write_tasks(out, tasks)
    write_json(out / "meta" / "stats.json", collected.stats(), indent=2)
    frames = sum(one.n for one in chosen)
    write_json(out / "meta" / "info.json", _info(sources[0], len(rows), frames, len(tasks)), indent=2)
    if (modality := read_modality(sources[0].folder)) is not None:
        write_json(out / "meta" / "modality.json", modality, indent=2)
    write_origin(out, sources, chosen, words)
    return Written(len(rows), frames, tasks, unused)


def _check_alike(sources: Sequence[Opened]) -> None:
    """Every source has the same columns, rate and robot as the first."""
    first = sources[0]
    for other in sources[1:]:
        if other.fps != first.fps:
            raise ValueError(f"{other.name} has {other.fps:g} frames a second, {first.name} {first.fps:g}")
        for key in sorted(first.features.keys() | other.features.keys()):
            mine, theirs = (_of_data(source.features.get(key)) for source in (first, other))
            if mine != theirs:
                raise ValueError(f"column {key!r}: {first.name} has {mine or 'none'}, {other.name} {theirs or 'none'}")


def _of_data(feature: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: feature[key] for key in INFO_OF_DATA if key in feature} if feature else {}


def _write_data(
    out: Path, sources: Sequence[Opened], chosen: Sequence[EpisodeFacts], tasks: list[str], renaming: Renaming,
    collected: Collected,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The data files; a row of meta/episodes for each episode, without what its videos say."""
    readers = [SourceRows(source) for source in sources]
    pending: list[pa.Table] = []
    file, first, schema = 0, 0, None
    for number, one in enumerate(chosen):
        rows = readers[one.source](one)
        rows = episode_rows(rows, one, sources[one.source].tasks, tasks, renaming, number, first)
        schema = schema or rows.schema
        rows = _cast(rows, schema, sources[one.source])
        collected.add(rows, one.row)
        yield _episode_row(one, rows, number, first, file, renaming, sources[one.source])
        pending.append(rows)
        first += one.n
        if sum(table.nbytes for table in pending) >= FILE_BYTES:
            _write_file(out, file, pending)
            pending, file = [], file + 1
    if pending:
        _write_file(out, file, pending)


def _cast(rows: pa.Table, schema: pa.Schema, source: Opened) -> pa.Table:
    if rows.schema.names != schema.names:
        rows = rows.select([name for name in schema.names if name in rows.schema.names])
    try:
        return rows.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise DatasetError(
            f"{source.name}: its rows have other columns or types: {str(error).splitlines()[0]}"
        ) from None


def _write_file(out: Path, file: int, tables: Sequence[pa.Table]) -> None:
    """One row group per episode, so that a reader of one episode touches only its bytes."""
    path = out / place(DATA_PATH, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema, compression="snappy") as writer:
        for table in tables:
            writer.write_table(table)


def _episode_row(
    one: EpisodeFacts, rows: pa.Table, number: int, first: int, file: int, renaming: Renaming, source: Opened
) -> dict[str, Any]:
    row = {key: value for key, value in one.row.items() if not key.startswith(("videos/", "data/", "meta/"))}
    row |= {
        "episode_index": number,
        "tasks": list(dict.fromkeys(renaming(text) for text in one.prompts)),
        "length": one.n,
        "dataset_from_index": first,
        "dataset_to_index": first + one.n,
        "source": source.name,
        "source_episode": one.index,
    }
    changed = [*RENUMBERED, *(OUTCOME if one.label else ())]
    if one.label:
        ends = {} if one.label.success == one.row.get("success") else {"truncated_by": ""}
        row |= {"success": one.label.success, "success_source": "human", **ends}
        row |= {"judge": one.label.by} if "judge" in row else {}
    for name in changed:
        if f"stats/{name}/min" in row:
            for key, value in vector_stats(rows[name].to_numpy(zero_copy_only=False)).items():
                row[f"stats/{name}/{key}"] = value.tolist()
    return row | address("data", file) | address("meta/episodes", number // FILES_PER_CHUNK)


def _copy_videos(
    out: Path, sources: Sequence[Opened], chosen: Sequence[EpisodeFacts], rows: Sequence[dict[str, Any]]
) -> int:
    """Each mp4 that an episode lies in, whole; its place goes into the rows. The frames that nothing refers to."""
    unused = 0
    for key in sources[0].videos:
        files: dict[Path, int] = {}
        for one, row in zip(chosen, rows, strict=True):
            source = sources[one.source]
            path = source.video_file(key, one.row)
            if path not in files:
                files[path] = len(files)
                target = out / place(VIDEO_PATH, files[path], video_key=key)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            row |= address(f"videos/{key}", files[path])
            row |= {f"videos/{key}/{end}": one.row[f"videos/{key}/{end}"] for end in ("from_timestamp", "to_timestamp")}
        unused += sum(frames_in(path) for path in files) - sum(one.n for one in chosen)
    return unused


def frames_in(path: Path) -> int:
    """Frames of an mp4. DatasetError where it cannot be read."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.frames or sum(1 for _ in container.decode(stream))
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from None


def _write_episodes(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for start in range(0, len(rows), FILES_PER_CHUNK):
        part = [{key: row.get(key) for key in keys} for row in rows[start : start + FILES_PER_CHUNK]]
        path = out / place(EPISODES_PATH, start // FILES_PER_CHUNK)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), path)


def _info(source: Opened, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
    return source.info | {
        "codebase_version": "v3.0",
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": FILES_PER_CHUNK,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if source.videos else None,
        "splits": {"train": f"0:{episodes}"},
    }


def write_origin(out: Path, sources: Sequence[Opened], chosen: Sequence[EpisodeFacts], words: str) -> None:
    """Which episodes of which datasets these are, for tools/runs.py show."""
    told = [
        {"source": source.name, "digest": dataset_digest(source.folder), "episodes": [
            one.index for one in chosen if one.source == place_]}
        for place_, source in enumerate(sources)
    ]  # fmt: skip
    code = revision()
    origin = {
        "time": time.time(),
        "selection": words,
        "sources": told,
        "short": {"commit": code.commit, "code": code.digest, "changed": len(code.changed), "user": user()},
        "libraries": libraries(),
    }
    write_sealed(out / "meta" / EXPORTED_ORIGIN, origin, indent=1)
