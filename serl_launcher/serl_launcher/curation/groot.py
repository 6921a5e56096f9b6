"""A dataset in the layout that NVIDIA's Isaac-GR00T reads: LeRobot v2.1 with meta/modality.json, for edit_dataset.

    data/chunk-000/episode_000000.parquet │ videos/chunk-000/<column>/episode_000000.mp4 │ meta/{info,stats}.json
    meta/{modality.json, episodes.jsonl, tasks.jsonl, episodes_stats.jsonl}

Isaac-GR00T's loader (gr00t/data/dataset/lerobot_episode_loader.py) takes one parquet and one mp4 an episode, slices of
`observation.state` and `action` by modality.json, the text by `annotation.human.task_description`, and stats.json with
mean, std, min, max, q01 and q99. Numbers stay the source's; every picture is encoded (anew): there must be an mp4.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serl_launcher.curation.rows import SourceRows
from serl_launcher.curation.sources import EpisodeFacts, Opened, read_modality
from serl_launcher.curation.statistics import Collected, numbers
from serl_launcher.curation.writer import frames_in, write_origin
from serl_launcher.datasets.dataset import Dataset, Rows
from serl_launcher.datasets.folder import DatasetError
from serl_launcher.exporter.features import video_info
from serl_launcher.exporter.video import CameraVideo
from serl_launcher.run.files import write_json, write_text

CHUNK = 1000  # episodes in a folder
DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
TEXT = "human.task_description"  # annotation.<TEXT>: the place of the prompt in tasks.jsonl, column task_index
FRAMES = 64  # decoded at once
GRIPPER = ("grip", "jaw", "finger")  # a dim of such a name is a part of its own


def write_groot(out: Path, source: str, words: str, modality: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a whole dataset in that layout; the modality.json that it has.

    words: of the command, for the record. modality: as the file; None: the source's own, else parts by the names of
    the dims. Raises ValueError or DatasetError in one line.
    """
    opened = Opened(source, 0)
    data = Dataset(str(opened.folder))
    rows = data.rows(data.spec())
    modality = dict(modality or read_modality(opened.folder) or modality_of(data))
    _check(opened, modality)
    collected = Collected(opened.features, opened.pictures)
    reader, told = SourceRows(opened), []
    for number, one in enumerate(opened.episodes):
        table = reader(one)
        collected.add(table, one.row)
        _write_numbers(out / DATA.format(**_place(number)), table, opened)
        _write_videos(out, data, rows, number, one.n, opened)
        told.append(_stats_line(number, table, one, opened))
    stats = collected.stats()
    write_json(out / "meta" / "stats.json", stats, indent=2)
    write_json(out / "meta" / "modality.json", modality, indent=2)
    write_json(out / "meta" / "info.json", _info(opened), indent=2)
    _write_lines(out / "meta" / "tasks.jsonl", ({"task_index": k, "task": t} for k, t in enumerate(opened.tasks)))
    _write_lines(out / "meta" / "episodes.jsonl", (_episode(k, one) for k, one in enumerate(opened.episodes)))
    _write_lines(out / "meta" / "episodes_stats.jsonl", told)
    write_origin(out, [opened], opened.episodes, words)
    return modality


def check_groot(out: Path, source: str) -> int:
    """Read back: each episode's numbers are the source's bit for bit, each mp4 has a frame a row. The rows compared."""
    opened = Opened(source, 0)
    reader, rows = SourceRows(opened), 0
    for number, one in enumerate(opened.episodes):
        path = out / DATA.format(**_place(number))
        found, expected = pq.read_table(path), reader(one)
        for name in found.schema.names:
            if numbers(found[name]).tobytes() != numbers(expected[name]).tobytes():
                raise DatasetError(f"{path}: column {name!r} is not the source's")
        for key in opened.pictures:
            video = out / VIDEO.format(video_key=key, **_place(number))
            if (there := frames_in(video)) != one.n:
                raise DatasetError(f"{video}: {there} frames, expected {one.n}")
        rows += one.n
    return rows


def modality_of(data: Dataset) -> dict[str, Any]:
    """modality.json by the names of the dims: runs of one prefix (`left.`), grippers apart; cameras by their names."""
    spec, columns = data.spec(), data.columns
    return {
        "state": _parts(list(spec.state_names)),
        "action": _parts(list(spec.action_names)),
        "video": {camera: {"original_key": key} for camera, (key, _) in columns.cameras.items()},
        "annotation": {TEXT: {"original_key": "task_index"}},
    }


def _parts(names: list[str]) -> dict[str, dict[str, int]]:
    """Name of a part -> its half-open slice. `left.j1, left.j2, left.gripper` are left 0:2 and left_gripper 2:3."""
    parts: dict[str, dict[str, int]] = {}
    last = None
    for place, name in enumerate(names):
        head, dot, _ = name.partition(".")
        part = f"{head}_" if dot and any(other.startswith(f"{head}.") for other in names if other != name) else ""
        part += "gripper" if any(word in name.lower() for word in GRIPPER) else "arm"
        part = part.removesuffix("_arm") or "arm"
        if part == last:
            parts[part]["end"] = place + 1
            continue
        while part in parts:  # the same again after others
            part += "_2"
        parts[part], last = {"start": place, "end": place + 1}, part
    return parts


def _check(opened: Opened, modality: Mapping[str, Any]) -> None:
    for key in opened.pictures:
        shape = opened.features[key]["shape"]
        if any(side % 2 for side in shape if side != 3):
            raise ValueError(f"{opened.name}: {key} is {shape}, and an mp4 needs even sides")
    for section in ("state", "action", "video"):
        if not isinstance(modality.get(section), Mapping) or not modality[section]:
            raise ValueError(f"modality.json: expected a section {section!r} with at least one entry")
    for section, column in (("state", "observation.state"), ("action", "action")):
        dims = opened.features[column]["shape"][0]
        for name, part in modality[section].items():
            start, end = part.get("start"), part.get("end")
            if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= dims):
                raise ValueError(f"modality.json: {section}.{name}: expected 0 <= start < end <= {dims}, got {part}")
    for name, entry in modality["video"].items():
        if (key := entry.get("original_key", f"observation.images.{name}")) not in opened.pictures:
            raise ValueError(f"modality.json: video.{name}: no column {key!r}; there are {opened.pictures}")


def _write_numbers(path: Path, rows: pa.Table, opened: Opened) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = rows.select([name for name in rows.schema.names if name not in opened.pictures])
    pq.write_table(rows.replace_schema_metadata(None), path)


def _write_videos(out: Path, data: Dataset, rows: Rows, number: int, n: int, opened: Opened) -> None:
    first, end = rows.bounds[number]
    videos = {}
    for camera, (key, (height, width)) in data.columns.cameras.items():
        path = out / VIDEO.format(video_key=key, **_place(number))
        videos[camera] = CameraVideo(path, height, width, round(opened.fps))
    for start in range(first, end, FRAMES):
        images = rows.images(range(start, min(start + FRAMES, end)))
        for camera, video in videos.items():
            video.add(images[camera])
    for video in videos.values():
        video.finish()


def _place(number: int) -> dict[str, int]:
    return {"episode_chunk": number // CHUNK, "episode_index": number}


def _info(opened: Opened) -> dict[str, Any]:
    features = {key: dict(feature) for key, feature in opened.features.items()}
    fps = round(opened.fps)
    for key in opened.pictures:
        height, width = (side for side in features[key]["shape"] if side != 3)
        features[key] |= {
            "dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"],
            "info": video_info(height, width, fps),
        }  # fmt: skip
    episodes = len(opened.episodes)
    return {
        "codebase_version": "v2.1",
        "robot_type": opened.info.get("robot_type"),
        "total_episodes": episodes,
        "total_frames": sum(one.n for one in opened.episodes),
        "total_tasks": len(opened.tasks),
        "total_videos": episodes * len(opened.pictures),
        "total_chunks": -(-episodes // CHUNK),
        "chunks_size": CHUNK,
        "fps": fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA,
        "video_path": VIDEO,
        "features": features,
    }


def _episode(number: int, one: EpisodeFacts) -> dict[str, Any]:
    said = {"success": one.success, "mode": one.mode, "stage": one.stage, "actor_id": one.actor}
    told = {key: value for key, value in said.items() if value is not None}
    return {"episode_index": number, "tasks": list(one.prompts), "length": one.n, **told}


def _stats_line(number: int, rows: pa.Table, one: EpisodeFacts, opened: Opened) -> dict[str, Any]:
    collected = Collected(opened.features, opened.pictures)
    collected.add(rows, one.row)
    return {"episode_index": number, "stats": collected.stats()}


def _write_lines(path: Path, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
