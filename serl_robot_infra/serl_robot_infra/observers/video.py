"""An mp4 of every k-th episode: cameras side by side, a border in the driver's colour, a caption. Fed by the loop.

Frames are kept by reference while the episode runs and encoded when it has ended, so the control loop pays nothing.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.contract.schema import EpisodeInfo, Observation, TimeStep

_BORDER = 6
_CAPTION = 22
_MIN_SIDE, _MAX_SIDE = 192, 400  # of a camera's height in the video; smaller ones are enlarged, larger ones thinned
_COLOURS = {"policy": (40, 110, 220), "operator": (235, 140, 20), "success": (30, 160, 70), "failure": (190, 40, 40)}
_CODECS = ("libx264", "h264", "mpeg4")
_OPTIONS = {"crf": "23", "preset": "veryfast", "threads": "1"}  # the robot waits meanwhile


class VideoObserver(Observer):
    """Writes `<folder>/<episode id>-<success|failure>.mp4`; the id begins with stage and seed.

    every: mode -> each k-th of its episodes, beginning with the first; 0, or not named: none. fps: the task's control
    rate for real time.
    """

    def __init__(self, folder: Path, every: Mapping[str, int], fps: float):
        self._folder = folder
        self.every = every  # may change between two episodes
        self._fps = max(1, round(fps))
        self._seen: Counter[str] = Counter()
        self._steps: list[TimeStep] | None = None

    def episode_started(self, info: EpisodeInfo) -> None:
        """Decide whether to record this one."""
        every = self.every.get(info.mode, 0)
        wanted = every > 0 and self._seen[info.mode] % every == 0
        self._seen[info.mode] += 1
        self._steps = [] if wanted else None

    def tick(self, step: TimeStep) -> None:
        if self._steps is not None:
            self._steps.append(step)

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        """Encode, and show the file only when it is whole."""
        steps, self._steps = self._steps, None
        if not steps or last_observation is None:
            return
        name, result = report.video_name, report.result
        frames = [frame_of(step.observation, driver_of(step), f"tick {i}") for i, step in enumerate(steps)]
        frames += [frame_of(last_observation, result, f"return {report.return_:.1f}")] * self._fps
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}.part"
        try:
            write_mp4(temporary, frames, self._fps)
            temporary.replace(self._folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def driver_of(step: TimeStep) -> str:
    """`operator` or `policy`."""
    return "operator" if step.intervention else "policy"


def frame_of(observation: Observation, label: str, note: str) -> np.ndarray:
    """uint8[h, w, 3] with even sides: the cameras, a border and caption for `label`, one of the colours' names."""
    views = [_sized(image) for image in observation.images.values()]
    height = max(view.shape[0] for view in views)
    views = [np.pad(view, ((0, height - view.shape[0]), (0, 0), (0, 0))) for view in views]
    row = np.concatenate(views, axis=1)
    colour = _COLOURS[label]
    h, w = row.shape[0] + 2 * _BORDER + _CAPTION, row.shape[1] + 2 * _BORDER
    canvas = np.full((h + h % 2, w + w % 2, 3), colour, np.uint8)
    canvas[_BORDER : _BORDER + row.shape[0], _BORDER : _BORDER + row.shape[1]] = row
    picture = Image.fromarray(canvas)
    ImageDraw.Draw(picture).text((_BORDER, row.shape[0] + _BORDER + 4), f"{label} · {note}", fill=(255, 255, 255))
    return np.asarray(picture)


def _sized(image: np.ndarray) -> np.ndarray:
    thinned = -(-image.shape[0] // _MAX_SIDE)
    image = image[::thinned, ::thinned]
    factor = max(1, -(-_MIN_SIDE // image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def write_mp4(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """Encode uint8[h, w, 3] frames of even, equal size as H.264, or MPEG-4 where PyAV has no H.264 encoder."""
    codec = next(codec for codec in _CODECS if _can_encode(codec))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=_OPTIONS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _can_encode(codec: str) -> bool:
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
