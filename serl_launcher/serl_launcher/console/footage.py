"""A video of an episode of which its actor made none: from the run's dataset, when a person at the page asks for it.

    console ─▶ `python -m serl_launcher.console.footage <run_dir> <episode_id>`, its own process ─▶ videos/<name>.mp4

Exit codes: 0 made, its name on stdout; 2 it cannot be made, why in one line on stderr.
"""

import io
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.exporter.video import CameraVideo
from serl_launcher.run.paths import RunPaths

HEIGHT = 240  # of every camera, pixels
Frames = Iterator[np.ndarray]  # uint8[h, w, 3]


def make(paths: RunPaths, episode_id: str) -> str:
    """The name of the video, which lies in videos/ then: cameras side by side, in real time.

    ValueError: the dataset has no such episode (yet), or no picture; OSError: the disk refuses.
    """
    info, row = find(paths.dataset, episode_id)
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] in ("image", "video")]
    if not cameras:
        raise ValueError("this task has no cameras")
    name = f"{episode_id}-{'success' if row.get('success') else 'failure'}.mp4"
    part = paths.videos / f".{name}.part"
    readers = [_camera(paths.dataset, info, row, key) for key in cameras]
    video = None
    try:
        for pictures in zip(*readers, strict=True):
            frame = np.hstack([resized(picture) for picture in pictures])
            video = video or CameraVideo(part, *frame.shape[:2], fps=int(info["fps"]))
            video.add(frame[None])
        if video is None:
            raise ValueError(f"the dataset has no picture of {episode_id}")
        video.finish()
        part.replace(paths.videos / name)
    finally:
        part.unlink(missing_ok=True)
    return name


def find(dataset: Path, episode_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """info.json and the episode's row of meta/episodes. ValueError: it is not there (yet)."""
    import pyarrow.parquet as pq

    if (dataset / "meta" / "info.json").is_file():
        info = json.loads((dataset / "meta" / "info.json").read_text(encoding="utf-8"))
        for path in sorted((dataset / "meta" / "episodes").rglob("*.parquet"), reverse=True):
            ids = pq.read_table(path, columns=["episode_id"])["episode_id"].to_pylist()
            if episode_id in ids:
                place = ids.index(episode_id)
                return info, pq.read_table(path).slice(place, 1).to_pylist()[0]
    raise ValueError(
        f"{episode_id} is not in the dataset yet, which takes finished episodes in every minute (exporter.period_s)"
    )


def _camera(dataset: Path, info: dict[str, Any], row: dict[str, Any], key: str) -> Frames:
    if info["features"][key]["dtype"] == "image":
        return _pictures(dataset / _place(info["data_path"], row, "data"), key, row["episode_index"])
    path = dataset / _place(info["video_path"], row, f"videos/{key}", key)
    return islice(_decoded(path, row[f"videos/{key}/from_timestamp"], info["fps"]), row["length"])


def _place(template: str, row: dict[str, Any], prefix: str, key: str = "") -> str:
    index = {name: row[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}
    return template.format(video_key=key, **index)


def _pictures(path: Path, key: str, episode_index: int) -> Frames:
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(path, columns=[key], filters=[("episode_index", "=", episode_index)])  # one row group of it
    for cell in rows[key]:
        yield np.asarray(Image.open(io.BytesIO(cell["bytes"].as_py())).convert("RGB"))


def _decoded(path: Path, start_s: float, fps: float) -> Frames:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        container.seek(int(start_s / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time is not None and frame.time >= start_s - 0.5 / fps:
                yield frame.to_ndarray(format="rgb24")


def resized(picture: np.ndarray) -> np.ndarray:
    """Of HEIGHT, its sides even, as the encoder wants them."""
    from PIL import Image

    width = 2 * round(picture.shape[1] * HEIGHT / picture.shape[0] / 2)
    return np.asarray(Image.fromarray(picture).resize((max(2, width), HEIGHT), Image.Resampling.NEAREST))


def main(argv: list[str]) -> int:
    run_dir, episode_id = argv
    try:
        print(make(RunPaths(Path(run_dir)), episode_id))
    except (ValueError, OSError, KeyError) as problem:
        print(" ".join(str(problem).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
