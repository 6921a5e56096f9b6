"""One mp4 per camera and commit, encoded while episodes arrive.

Called by the dataset writer. Frames of consecutive episodes follow each other in the file; the episodes file says at
which second an episode starts. A key frame every second frame keeps random reads cheap for LeRobot's loader.
"""

from pathlib import Path

import numpy as np

from serl_transport.contract.specs import TaskSpec

LOSSLESS_PIXELS = 128 * 128  # `video: auto` keeps images up to this size as PNG
ENCODER = {"preset": "veryfast", "crf": "18", "g": "2", "threads": "1"}


def wants_video(setting: str | bool, spec: TaskSpec) -> bool:
    """Resolve `exporter.video`: true, false, or auto (PNG for small images, mp4 for large ones).

    ValueError: an unknown setting, or video asked for images whose sides are odd, which yuv420p cannot hold.
    """
    text = str(setting).lower()
    if text not in ("auto", "true", "false"):
        raise ValueError(f"exporter.video: expected auto, true or false, got {setting!r}")
    odd = [camera for camera, size in spec.cameras.items() if size[0] % 2 or size[1] % 2]
    if text == "true" and odd:
        raise ValueError(
            f"exporter.video: camera {odd[0]!r} is {spec.cameras[odd[0]]}, and video needs even sides: "
            "set exporter.video=false"
        )
    large = max((height * width for height, width in spec.cameras.values()), default=0) > LOSSLESS_PIXELS
    return text == "true" or (text == "auto" and large and not odd)


class CameraVideo:
    """An mp4 under construction. `add` frames, then `finish`; `frames` counts what went in."""

    def __init__(self, path: Path, height: int, width: int, fps: int) -> None:
        import av

        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=fps, options=ENCODER)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self.frames = 0

    def add(self, images: np.ndarray) -> None:
        """Encode uint8[n, h, w, 3]."""
        import av

        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self.frames
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def finish(self) -> None:
        """Write what the encoder still holds and close the file."""
        self._container.mux(self._stream.encode())
        self._container.close()
