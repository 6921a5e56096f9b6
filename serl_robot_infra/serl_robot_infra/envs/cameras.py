"""Cameras of a driver of ours, by OpenCV: sizes of the yaml and the task, one `FreshCamera` each.

    device or URL ─▶ cv2.VideoCapture ─▶ camera.FreshCamera (a thread, limits, opened anew) ─▶ `Cameras.images`

Called by envs/dobot/env.py. OpenCV is the `cameras` extra, imported when a camera is opened.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from serl_robot_infra.envs.camera import FreshCamera
from serl_robot_infra.envs.images import fitted, shape_refusal

INSTALL = "VIRTUAL_ENV=.venv .venv/bin/uv pip install opencv-python-headless"
_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class CameraSettings:
    """task.env.cameras.<name>. ValueError names a key that is no good."""

    source: str | int  # a device (/dev/v4l/by-id/…), its number, or a URL
    width: int = 640
    height: int = 480
    fps: int = 30
    fourcc: str | None = None  # MJPG: three USB cameras on one controller need it
    flip: bool = False  # turned by 180 degrees: mounted upside down

    def __post_init__(self) -> None:
        for name in ("width", "height", "fps"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {getattr(self, name)!r}")
        if self.fourcc is not None and len(self.fourcc) != 4:
            raise ValueError(f"fourcc: expected four letters such as MJPG, or null, got {self.fourcc!r}")


class OpenCvDevice:
    """One opened camera, for `FreshCamera`. ConnectionError: it gives nothing; ValueError: it gives another size."""

    def __init__(self, name: str, settings: CameraSettings):
        self._settings, self._reading, self._closed = settings, threading.Lock(), False
        self._capture = _open(name, settings)
        wanted, got = (settings.height, settings.width), self.read().shape[:2]
        if got != wanted:
            self.close()
            raise ValueError(f"task.env.cameras.{name}: expected {wanted[1]}x{wanted[0]}, it gives {got[1]}x{got[0]}")

    def read(self) -> np.ndarray:
        """The next picture, uint8[height, width, 3], RGB."""
        with self._reading:
            taken, picture = (False, None) if self._closed else self._capture.read()
        if not taken or picture is None:
            raise ConnectionError(f"{self._settings.source} gives no picture")
        turned = picture[::-1, ::-1, ::-1] if self._settings.flip else picture[:, :, ::-1]
        return np.ascontiguousarray(turned)

    def close(self) -> None:
        """A driver that hangs in a read keeps its thread, not this one: OpenCV must not let go of it meanwhile."""
        self._closed = True
        if self._reading.acquire(timeout=_CLOSE_S):
            self._capture.release()
            self._reading.release()


class Cameras:
    """All cameras of a robot.

    Args:
        nodes: name -> a `CameraSettings` as yaml has it; sizes: name -> (height, width) that the task asks for.
        max_age_ms, frozen_s: as of `FreshCamera`.

    Raises ValueError for names or keys that do not fit, ImportError without OpenCV, OSError and PartLostError for a
    camera that gives nothing.
    """

    def __init__(
        self, nodes: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, tuple[int, int]], max_age_ms: float,
        frozen_s: float | None,
    ):  # fmt: skip
        self._sizes = dict(sizes)
        self._cameras: dict[str, FreshCamera] = {}
        try:
            for name, settings in _settings(nodes, sizes).items():
                opening = partial(OpenCvDevice, name, settings)
                self._cameras[name] = FreshCamera(name, opening, max_age_ms, frozen_s)
        except BaseException:
            self.close()
            raise

    def images(self) -> dict[str, np.ndarray]:
        """uint8[h, w, 3] of each size asked for. PartLostError names the camera that is lost or frozen."""
        return {name: fitted(camera.read(), self._sizes[name]) for name, camera in self._cameras.items()}

    def mend(self) -> None:
        """An episode begins: open anew those that were lost. PartLostError: one does not come back."""
        for camera in self._cameras.values():
            camera.ready()

    def close(self) -> None:
        """Let go of them all."""
        for camera in self._cameras.values():
            camera.close()


def _settings(
    nodes: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, CameraSettings]:
    if set(nodes) != set(sizes):
        raise ValueError(
            f"task.env.cameras: expected {', '.join(sizes) or 'none'} as in task.spec.cameras, got "
            f"{', '.join(nodes) or 'none'}"
        )
    settings = {}
    for name, node in nodes.items():
        try:
            settings[name] = CameraSettings(**node)
        except (TypeError, ValueError) as mistake:
            raise ValueError(f"task.env.cameras.{name}: {mistake}") from None
        taken = (settings[name].height, settings[name].width, 3)
        if refusal := shape_refusal(name, taken, sizes[name]):
            raise ValueError(refusal)
    return settings


def _open(name: str, settings: CameraSettings) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"task.env.cameras needs OpenCV ({error}): {INSTALL}") from None
    capture = cv2.VideoCapture(settings.source)
    if not capture.isOpened():
        raise ConnectionError(f"camera {name}: {settings.source} cannot be opened")
    if settings.fourcc is not None:
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*settings.fourcc))
    for key, value in (
        (cv2.CAP_PROP_FRAME_WIDTH, settings.width),
        (cv2.CAP_PROP_FRAME_HEIGHT, settings.height),
        (cv2.CAP_PROP_FPS, settings.fps),
    ):
        capture.set(key, float(value))
    return capture
