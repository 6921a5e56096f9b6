"""Pictures of a dataset's rows: PNG within the rows or video beside them, as uint8[h, w, 3] of the size that is asked.

LeRobot's own reader opens the rows, once, when the first picture is asked for (it brings torch). Videos are decoded by
torchcodec through LeRobot where it loads, else by PyAV. What cannot be decoded is named by file, episode and frame.
"""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from serl_launcher.datasets.folder import DatasetError
from serl_launcher.datasets.table import EpisodePlace

TOLERANCE_S = 1e-3  # between a row's time and its picture's in the video
NEAR_S = 0.2  # what lies no farther ahead is decoded up to; farther, the decoder jumps to the key frame before it
UNREADABLE = (OSError, ValueError, RuntimeError, AssertionError, IndexError, KeyError, TypeError, EOFError)


class Pictures:
    """columns: camera -> column; sizes: camera -> (height, width) of what is returned."""

    def __init__(self, folder: Path, columns: Mapping[str, str], sizes: Mapping[str, tuple[int, int]]) -> None:
        self._folder, self._columns, self._sizes = folder, columns, sizes
        self._dataset: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None}  # a loader's process opens its own

    def of(self, episode: EpisodePlace, rows: Sequence[int], timestamps: Sequence[float]) -> dict[str, np.ndarray]:
        """camera -> uint8[n, h, w, 3] of rows of one episode; timestamps: of these rows, s from its beginning."""
        return {
            camera: np.stack(
                [resized(picture, self._sizes[camera]) for picture in self._read(key, episode, rows, timestamps)]
            )
            for camera, key in self._columns.items()
        }

    def _read(
        self, key: str, episode: EpisodePlace, rows: Sequence[int], timestamps: Sequence[float]
    ) -> list[np.ndarray]:
        if key in episode.videos:
            path, start = episode.videos[key]
            try:
                return _decoded(path, [start + t for t in timestamps])
            except UNREADABLE as error:
                frames = f"{rows[0] - episode.first} to {rows[-1] - episode.first}"
                raise _unreadable(path, episode, frames, key, error) from None
        found, cells = [], self._open().data.column(key)
        for row in rows:
            try:
                found.append(self._png(cells[row].as_py()))
            except UNREADABLE as error:
                raise _unreadable(episode.file, episode, str(row - episode.first), key, error) from None
        return found

    def _png(self, cell: Mapping[str, Any]) -> np.ndarray:
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else self._folder / cell["path"]
        with Image.open(source) as image:
            return np.asarray(image.convert("RGB"))

    def _open(self) -> Any:
        """The rows as LeRobot keeps them, in files that are mapped, not read."""
        if self._dataset is None:
            from lerobot.datasets import LeRobotDataset

            # Every file was found to be there, so that nothing is asked of the hub.
            self._dataset = LeRobotDataset(
                f"local/{self._folder.name}", root=self._folder, video_backend=video_backend()
            )
        return self._dataset.hf_dataset


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[h, w, 3] of another size of the same shape: averaged where it gets smaller, else interpolated."""
    if picture.shape[:2] == tuple(size):
        return picture
    smaller = picture.shape[0] >= size[0] and picture.shape[1] >= size[1]
    how = Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), how))


@cache
def video_backend() -> str:
    """LeRobot's name of what decodes videos here: torchcodec where it loads, which needs FFmpeg, else pyav.

    Left to itself LeRobot takes the same one, after printing every way in which torchcodec was looked for. Asked once:
    an import that fails is tried anew each time, for tens of milliseconds.
    """
    try:
        import torchcodec  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return "pyav"
    return "torchcodec"


def _decoded(path: Path, times: Sequence[float]) -> list[np.ndarray]:
    """uint8[h, w, 3] of each time in a video, s from its beginning."""
    if video_backend() == "pyav":
        found = _by_pyav(path, sorted(set(times)))
        return [found[t] for t in times]
    from lerobot.datasets.video_utils import decode_video_frames

    frames = decode_video_frames(path, list(times), TOLERANCE_S, video_backend(), return_uint8=True)
    return list(frames.permute(0, 2, 3, 1).numpy())


def _by_pyav(path: Path, times: Sequence[float]) -> dict[float, np.ndarray]:
    """Ascending times to pictures. In half the time of LeRobot's function, which decodes from a key frame too early,
    converts what nobody asked for, and whose threads decode ahead: a random picture is all that a batch wants."""
    import av

    found: dict[float, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        at, frames = -np.inf, iter(())
        for time in times:
            if time - at > NEAR_S:
                container.seek(round(time / stream.time_base), stream=stream)  # to the key frame at or before it
                frames = container.decode(stream)
            while at < time - TOLERANCE_S:
                frame = next(frames, None)
                if frame is None:
                    raise ValueError(f"the video ends before {time:.3f} s")
                at = float(frame.pts * stream.time_base)
            if at > time + TOLERANCE_S:
                raise ValueError(f"no picture at {time:.3f} s, the next is at {at:.3f}")
            found[time] = frame.to_ndarray(format="rgb24")
    return found


def _unreadable(path: Path, episode: EpisodePlace, frames: str, key: str, error: Exception) -> DatasetError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DatasetError(f"{path}: episode {episode.index}, frame {frames}: {key} cannot be decoded: {why}")
