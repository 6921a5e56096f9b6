#!/usr/bin/env python
"""Merge videos of a run: one after the other, in a grid, before beside after, or as a sheet of pictures.

    python tools/merge_video.py quickstart -o all.mp4                      # runs/quickstart/videos, in sequence
    python tools/merge_video.py --video_folder clips --output_path all.mp4 --fps 30
    python tools/merge_video.py quickstart -o grid.mp4 --columns 4         # four at a time
    python tools/merge_video.py quickstart -o sheet.png --pictures 8       # contact sheet: a row a clip
    python tools/merge_video.py quickstart -o both.mp4 --before-after      # evaluations of the first and last version
    python tools/merge_video.py quickstart --dataset --stage after -o after.mp4 --columns 3
    python tools/merge_video.py a.mp4 b.mp4 -o ab.mp4

    python tools/merge_video.py robot7 --dataset --split -o runs/robot7/videos   # a file for each episode

With `--dataset` the clips are the dataset's episodes (PNG or mp4 inside), their cameras side by side: of every actor,
wherever it ran. `--before-after` without it takes evaluation.csv and the videos it names, on the robot's host. Needs
nothing of the learner's.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from visualize_dataset import VERSION, episodes, find_dataset

from serl_transport.contract.bounds import shown

Frames = Iterator[np.ndarray]  # uint8[h, w, 3]


@dataclass(frozen=True, slots=True)
class Clip:
    """A video that can be read once, from its beginning."""

    name: str  # for messages
    fps: float  # frames per second
    read: Callable[[], Frames]  # opens it
    label: str = ""  # written into the picture


def main(argv: list[str] | None = None) -> int:
    """Merge; the exit status."""
    args = _parser().parse_args(argv)
    try:
        return _do(args)
    except (ValueError, OSError) as error:
        print(f"merge_video: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge videos of a run.")
    add = parser.add_argument
    add("sources", nargs="*", help="a run's name or folder, a folder of mp4 files, or mp4 files")
    add("--video_folder", help="a source, as well")
    add("-o", "--output", "--output_path", dest="output", type=Path, required=True, metavar="FILE",
        help=".mp4; .png or .jpg: a contact sheet; a folder with --split")  # fmt: skip
    add("--fps", type=float, default=0.0, help="of the result; 0: of the first clip")
    add("--split", action="store_true", help="with --dataset: a file for each episode that has none yet")
    add("--before-after", action="store_true", help="evaluation trials of the first and last policy version in pairs")
    add("--pictures", type=int, default=8, help="of a contact sheet: of each clip, evenly over its time")
    add("--columns", type=int, default=1, help="clips side by side; 1: one after the other")
    add("--rows", type=int, default=0, help="rows of the grid; 0: as many as columns")
    add("--height", type=int, default=256, help="pixels of a clip's height in the result")
    add("--dataset", action="store_true", help="take the episodes of the LeRobot dataset")
    add("--mode", help="with --dataset: demo, online or eval episodes only")
    add("--stage", help="with --dataset: episodes of this stage only")
    add("--last", type=int, default=0, help="only the last so many clips")
    return parser


def _do(args: argparse.Namespace) -> int:
    sources = [*args.sources, *([args.video_folder] if args.video_folder else [])]
    if not sources:
        raise ValueError("expected a run, a folder or mp4 files (or --video_folder), got none")
    if args.split and not args.dataset:
        raise ValueError("--split writes a file for each episode of a dataset: say --dataset, too")
    if args.height < 2 or args.columns < 1 or args.pictures < 1 or not 0 <= args.fps <= 240:
        raise ValueError(
            "expected --height >= 2, --columns and --pictures >= 1 and --fps up to 240, "
            f"got {args.height}, {args.columns}, {args.pictures} and {args.fps:g}"
        )
    if args.before_after:
        clips, args.columns, args.rows = before_after(sources[0], args.dataset), 2, 1
    else:
        clips = dataset_clips(sources[0], args.mode, args.stage) if args.dataset else file_clips(sources)
    clips = clips[-args.last :] if args.last else clips
    if args.split:
        return split(clips, args.output, args.height)
    if args.output.suffix.lower() in (".png", ".jpg", ".jpeg"):
        contact_sheet(clips, args.output, args.pictures, args.height)
        print(f"wrote {args.output}: {len(clips)} clips, {args.pictures} pictures of each")
        return 0
    cells = (args.columns, args.rows or args.columns) if args.columns > 1 else (1, 1)
    count = merge(clips, args.output, cells, args.height, args.fps)
    print(f"wrote {args.output}: {len(clips)} clips, {count} frames")
    return 0


def before_after(source: str, dataset: bool) -> list[Clip]:
    """Evaluation trials of the first policy version, each followed by one of the last: of the same seed where there is
    one, else the next in order. ValueError when fewer than two versions were evaluated.
    """
    trials = _dataset_trials(source) if dataset else _table_trials(source)
    versions = sorted({version for version, _, _ in trials})
    if len(versions) < 2:
        raise ValueError(f"{source}: --before-after needs evaluations of two policy versions, got {versions or 'none'}")
    before, after = ([trial for trial in trials if trial[0] == v] for v in (versions[0], versions[-1]))
    seeds = {seed: clip for _, seed, clip in after}
    pairs = [(clip, seeds[seed]) for _, seed, clip in before if seed in seeds]
    pairs = pairs or [(one[2], other[2]) for one, other in zip(before, after, strict=False)]
    return [clip for pair in pairs for clip in pair]


def _dataset_trials(source: str) -> list[tuple[int, int, Clip]]:
    """(policy version, seed, clip) of each evaluation episode of the dataset."""
    root = find_dataset(source)
    info = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))
    rows = [row for row in episodes(root) if row.get("mode") == "eval" and row.get(VERSION)]
    return [
        _trial(int(row[VERSION][0]), int(row.get("seed") or 0), bool(row.get("success")), clip_name(row), info["fps"],
               lambda row=row: read_episode(root, info, row))
        for row in rows
    ]  # fmt: skip


def _table_trials(source: str) -> list[tuple[int, int, Clip]]:
    """The same of the rows of evaluation.csv that have a video."""
    root = next((path for path in (Path(source), Path("runs") / source) if (path / "evaluation.csv").is_file()), None)
    if root is None:
        raise ValueError(f"{source}: no evaluation.csv there; with --dataset the trials are those of the dataset")
    with (root / "evaluation.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("video") and inside(root, row["video"]).is_file()]
    return [
        _trial(int(row["policy_version"]), int(row["seed"]), row["success"] == "1", row["video"],
               _rate(root / row["video"]), lambda row=row: read_video(root / row["video"]))
        for row in rows
    ]  # fmt: skip


def _trial(
    version: int, seed: int, success: bool, name: str, fps: float, read: Callable[[], Frames]
) -> tuple[int, int, Clip]:
    label = f"v{version} seed {seed} {'success' if success else 'failure'}"
    return version, seed, Clip(name, fps, read, label)


def contact_sheet(clips: Sequence[Clip], output: Path, pictures: int, height: int) -> None:
    """A picture file with a row for each clip: `pictures` frames evenly from its first to its last, and its name.

    A clip with fewer frames shows some of them twice.
    """
    rows = []
    for clip in clips:
        count = sum(1 for _ in clip.read())
        wanted = np.linspace(0, count - 1, pictures).round().astype(int).tolist()
        chosen = {k: resize(image, height) for k, image in enumerate(clip.read()) if k in wanted}
        rows.append(labelled(np.concatenate([chosen[k] for k in wanted], axis=1), clip.label or clip.name))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(padded, axis=0)).save(output)


def labelled(image: np.ndarray, text: str) -> np.ndarray:
    """uint8[h, w, 3] with the text on a dark bar at its top left; without text as it is."""
    if not text:
        return image
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    _, _, right, bottom = draw.textbbox((3, 2), text)
    draw.rectangle((0, 0, right + 3, bottom + 2), fill=(0, 0, 0))
    draw.text((3, 2), text, fill=(255, 255, 255))
    return np.array(picture)


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


def merge(clips: Sequence[Clip], output: Path, cells: tuple[int, int], height: int, fps: float = 0.0) -> int:
    """Write the clips page by page, columns x rows at a time; a clip that ends first holds its last frame.

    fps: of the result, which shows every frame once; 0: the first clip's. Returns the number of frames.
    """
    columns, rows = cells
    height -= height % 2
    part = output.with_suffix(".part.mp4")
    output.parent.mkdir(parents=True, exist_ok=True)
    width = max(resize(next(clip.read()), height).shape[1] for clip in clips)
    count = 0
    with av.open(str(part), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps or clips[0].fps or 1).limit_denominator(1001), options={"crf": "20"}
        )
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
            image = labelled(resize(image, height)[:, :width], clips[cell].label)
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
