#!/usr/bin/env python
"""Merge videos of a run into one mp4: one after the other, or side by side in a grid.

    python tools/merge_video.py quickstart -o all.mp4                      # runs/quickstart/videos, in sequence
    python tools/merge_video.py quickstart -o grid.mp4 --columns 4         # four at a time
    python tools/merge_video.py quickstart --dataset --stage after -o after.mp4 --columns 3
    python tools/merge_video.py a.mp4 b.mp4 -o ab.mp4

    python tools/merge_video.py robot7 --dataset --split -o runs/robot7/videos   # a file for each episode

With `--dataset` the clips are the dataset's episodes (PNG or mp4 inside), their cameras side by side: of every actor,
wherever it ran. Needs nothing of the learner's.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from visualize_dataset import episodes, find_dataset

from serl_transport.contract.bounds import shown

Frames = Iterator[np.ndarray]  # uint8[h, w, 3]


@dataclass(frozen=True, slots=True)
class Clip:
    """A video that can be read once, from its beginning."""

    name: str  # for messages
    fps: float  # frames per second
    read: Callable[[], Frames]  # opens it


def main(argv: list[str] | None = None) -> int:
    """Merge; the exit status."""
    parser = argparse.ArgumentParser(description="Merge videos of a run into one mp4.")
    parser.add_argument("sources", nargs="+", help="a run's name or folder, a folder of mp4 files, or mp4 files")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.mp4", help="a folder with --split")
    parser.add_argument(
        "--split", action="store_true", help="with --dataset: a file for each episode that has none yet"
    )
    parser.add_argument("--columns", type=int, default=1, help="clips side by side; 1: one after the other")
    parser.add_argument("--rows", type=int, default=0, help="rows of the grid; 0: as many as columns")
    parser.add_argument("--height", type=int, default=256, help="pixels of a clip's height in the result")
    parser.add_argument("--dataset", action="store_true", help="take the episodes of the LeRobot dataset")
    parser.add_argument("--mode", help="with --dataset: demo, online or eval episodes only")
    parser.add_argument("--stage", help="with --dataset: episodes of this stage only")
    parser.add_argument("--last", type=int, default=0, help="only the last so many clips")
    args = parser.parse_args(argv)
    try:
        if args.split and not args.dataset:
            raise ValueError("--split writes a file for each episode of a dataset: say --dataset, too")
        clips = dataset_clips(args.sources[0], args.mode, args.stage) if args.dataset else file_clips(args.sources)
        clips = clips[-args.last :] if args.last else clips
        if args.split:
            return split(clips, args.output, args.height)
        cells = (args.columns, args.rows or args.columns) if args.columns > 1 else (1, 1)
        count = merge(clips, args.output, cells, args.height)
    except (ValueError, OSError) as error:
        print(f"merge_video: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output}: {len(clips)} clips, {count} frames")
    return 0


def file_clips(sources: Sequence[str]) -> list[Clip]:
    """mp4 files in the order given; those of a folder by age. ValueError when there is none."""
    paths: list[Path] = []
    for source in sources:
        folders = [Path(source) / "videos", Path(source), Path("runs") / source / "videos"]
        if Path(source).is_file():
            paths.append(Path(source))
            continue
        found = next((files for folder in folders if (files := list(folder.rglob("*.mp4")))), None)
        if found is None:
            raise ValueError(f"no mp4 files at {', '.join(map(str, folders))}: expected a run, a folder or mp4 files")
        paths += sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [Clip(path.name, _rate(path), lambda path=path: read_video(path)) for path in paths]


def dataset_clips(source: str, mode: str | None, stage: str | None) -> list[Clip]:
    """The dataset's episodes, cameras side by side. ValueError when none fits."""
    root = find_dataset(source)
    info = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))
    rows = [r for r in episodes(root) if mode in (None, r.get("mode")) and stage in (None, r.get("stage"))]
    if not rows:
        raise ValueError(f"no episode of {root} fits --mode {mode} --stage {stage}")
    return [Clip(clip_name(row), info["fps"], lambda row=row: read_episode(root, info, row)) for row in rows]


def clip_name(row: dict[str, Any]) -> str:
    """`<episode id>-<success|failure>`, the name that the actor gives its video; without an id the episode's number."""
    parts = [re.sub(r"[^\w .-]", "_", str(row.get("episode_id") or f"episode-{row['episode_index']:05d}"))]
    parts += ["success" if row["success"] else "failure"] if row.get("success") is not None else []
    return "-".join(parts)


def split(clips: Sequence[Clip], folder: Path, height: int) -> int:
    """A file for each clip that has none in `folder` yet; the exit status."""
    missing = [clip for clip in clips if not (folder / f"{clip.name}.mp4").exists()]
    for clip in missing:
        merge([clip], folder / f"{clip.name}.mp4", (1, 1), height)
    print(f"wrote {len(missing)} files to {folder}; {len(clips) - len(missing)} were there")
    return 0


def inside(folder: Path, name: str) -> Path:
    """A file that something in `folder` names, which lies in it. ValueError for a path that leads out."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: it names {shown(name)}, a file out of the folder")
    return path


def read_video(path: Path, start: float = 0.0, frames: int | None = None) -> Frames:
    """Frames of a video file, from `start` seconds on."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        if start:
            container.seek(int(start / stream.time_base), stream=stream)  # type: ignore[operator]
        wanted = (f for f in container.decode(stream) if f.time is None or f.time >= start - 1e-3)
        for frame in islice(wanted, frames):
            yield frame.to_ndarray(format="rgb24")


def read_episode(root: Path, info: dict[str, Any], row: dict[str, Any]) -> Frames:
    """Frames of a dataset's episode, its cameras side by side at the height of the tallest."""
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] in ("image", "video")]
    streams = [_camera(root, info, row, key) for key in cameras]
    height = max(info["features"][key]["shape"][0] for key in cameras)
    for images in zip(*streams, strict=True):
        yield np.concatenate([resize(image, height) for image in images], axis=1)


def _camera(root: Path, info: dict[str, Any], row: dict[str, Any], key: str) -> Frames:
    if info["features"][key]["dtype"] == "video":
        place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        path = inside(root, info["video_path"].format(video_key=key, **place))
        yield from read_video(path, row[f"videos/{key}/from_timestamp"], row["length"])
        return
    place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
    path = inside(root, info["data_path"].format(**place))
    table = pq.read_table(path, columns=[key], filters=[("episode_index", "=", row["episode_index"])])
    for cell in table[key].to_pylist():
        yield np.array(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))


def resize(image: np.ndarray, height: int) -> np.ndarray:
    """uint8[h, w, 3] to the height, keeping the aspect; small images are enlarged without blur. Even width."""
    width = max(2, round(image.shape[1] * height / image.shape[0] / 2) * 2)
    enlarge = height >= image.shape[0]
    method = Image.Resampling.NEAREST if enlarge else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(image).resize((width, height), method))


def merge(clips: Sequence[Clip], output: Path, cells: tuple[int, int], height: int) -> int:
    """Write the clips page by page, columns x rows at a time; a clip that ends first holds its last frame.

    Returns the number of frames.
    """
    if height < 2 or min(cells) < 1:
        raise ValueError(f"expected --height >= 2 and --columns >= 1, got {height} and {cells[0]}")
    columns, rows = cells
    height -= height % 2
    part = output.with_suffix(".part.mp4")
    output.parent.mkdir(parents=True, exist_ok=True)
    width = max(resize(next(clip.read()), height).shape[1] for clip in clips)
    count = 0
    with av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=round(clips[0].fps) or 1, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width * columns, height * rows, "yuv420p"
        for first in range(0, len(clips), columns * rows):
            for page in _pages(clips[first : first + columns * rows], columns, rows, width, height):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")))
                count += 1
        container.mux(stream.encode())
    part.replace(output)
    return count


def _pages(clips: Sequence[Clip], columns: int, rows: int, width: int, height: int) -> Frames:
    """Frames of one page of the grid, until its longest clip ends."""
    page = np.zeros((rows * height, columns * width, 3), np.uint8)
    streams: dict[int, Frames] = {cell: clip.read() for cell, clip in enumerate(clips)}
    while streams:
        for cell, stream in list(streams.items()):
            image = next(stream, None)
            if image is None:
                del streams[cell]
                continue
            image = resize(image, height)[:, :width]
            top, left = cell // columns * height, cell % columns * width
            page[top : top + height, left : left + image.shape[1]] = image
        if streams:
            yield page.copy()


def _rate(path: Path) -> float:
    try:
        with av.open(str(path)) as container:
            return float(container.streams.video[0].average_rate or 10)
    except (av.error.InvalidDataError, IndexError) as error:
        raise ValueError(f"{path} is no video: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
