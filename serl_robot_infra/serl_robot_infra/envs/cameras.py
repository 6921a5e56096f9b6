"""Cameras of a driver of ours, by OpenCV: a thread each, the newest picture, and which of them gives none any more.

    device or URL ─▶ cv2.VideoCapture ─▶ reading thread ─▶ newest picture + when ─▶ `Cameras.images`

Called by envs/dobot/env.py; FrozenCheck also by envs/lerobot_robot.py, whose cameras are LeRobot's. OpenCV is the
`cameras` extra, imported when a camera is opened.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from serl_robot_infra.envs.images import fitted, shape_refusal

log = logging.getLogger(__name__)

INSTALL = "VIRTUAL_ENV=.venv .venv/bin/uv pip install opencv-python-headless"
_FIRST_S = 5.0  # a camera's first picture
_CLOSE_S = 1.0


class FrozenCheck:
    """A camera whose picture does not change by a single bit is frozen: a sensor's noise changes every picture."""

    def __init__(self, limit_s: float | None):
        self.limit_s = limit_s
        self.forget()

    def forget(self) -> None:
        """An episode begins."""
        self._last: np.ndarray | None = None
        self._changed = 0.0

    def is_frozen(self, image: np.ndarray) -> bool:
        """Has it been the same for too long?"""
        now = time.monotonic()
        if self._last is None or not np.array_equal(self._last, image):
            self._last, self._changed = image.copy(), now
        return self.limit_s is not None and now - self._changed > self.limit_s


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


class Camera:
    """Open from construction on. ConnectionError: it cannot be opened; ValueError: it gives another size."""

    def __init__(self, name: str, settings: CameraSettings):
        self.name, self._settings = name, settings
        self._capture = _open(name, settings)
        self._newest: tuple[float, np.ndarray] | None = None
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=f"camera-{name}", daemon=True)
        self._thread.start()
        self._check_first()

    def newest(self, max_age_s: float) -> np.ndarray:
        """uint8[height, width, 3], RGB. TimeoutError: it is older."""
        newest = self._newest
        if newest is None:
            raise TimeoutError(f"camera {self.name}: no picture")
        if (age := time.monotonic() - newest[0]) > max_age_s:
            raise TimeoutError(f"camera {self.name}: the newest picture is {age * 1e3:.0f} ms old")
        return newest[1]

    def close(self) -> None:
        """A driver that hangs in a read keeps its thread, not this one."""
        self._ending = True
        self._thread.join(_CLOSE_S)

    def _check_first(self) -> None:
        deadline = time.monotonic() + _FIRST_S
        while self._newest is None and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._newest is None:
            self.close()
            raise ConnectionError(f"camera {self.name}: {self._settings.source} gives no picture")
        wanted, got = (self._settings.height, self._settings.width), self._newest[1].shape[:2]
        if got != wanted:
            self.close()
            raise ValueError(
                f"task.env.cameras.{self.name}: expected {wanted[1]}x{wanted[0]}, it gives {got[1]}x{got[0]}"
            )

    def _run(self) -> None:
        while not self._ending:
            taken, picture = self._capture.read()
            if not taken:  # unplugged: what is shown is too old soon
                break
            turned = picture[::-1, ::-1, ::-1] if self._settings.flip else picture[:, :, ::-1]
            self._newest = (time.monotonic(), np.ascontiguousarray(turned))
        self._capture.release()


class Cameras:
    """All cameras of a robot.

    Args:
        nodes: name -> a `CameraSettings` as yaml has it; sizes: name -> (height, width) that the task asks for.
        max_age_s: an older picture is a lost camera. frozen_s: so is one that does not change by a bit; None: is not.

    Raises ValueError for names or keys that do not fit, ImportError without OpenCV, OSError for a camera that gives
    nothing.
    """

    def __init__(
        self, nodes: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, tuple[int, int]], max_age_s: float,
        frozen_s: float | None,
    ):  # fmt: skip
        self._settings = _settings(nodes, sizes)
        self._sizes, self._max_age_s = dict(sizes), max_age_s
        self._frozen = {name: FrozenCheck(frozen_s) for name in sizes}
        self._cameras: dict[str, Camera] = {}
        try:
            for name, settings in self._settings.items():
                self._cameras[name] = Camera(name, settings)
        except BaseException:
            self.close()
            raise

    def images(self) -> dict[str, np.ndarray]:
        """uint8[h, w, 3] of each size asked for. TimeoutError names the camera that is lost or frozen."""
        images = {}
        for name, camera in self._cameras.items():
            picture = camera.newest(self._max_age_s)
            if self._frozen[name].is_frozen(picture):
                raise TimeoutError(f"camera {name}: the same picture for {self._frozen[name].limit_s:g} s")
            images[name] = fitted(picture, self._sizes[name])
        return images

    def mend(self) -> None:
        """Open anew those that give no new pictures. An episode begins."""
        for name, settings in self._settings.items():
            try:
                frozen = self._frozen[name].is_frozen(self._cameras[name].newest(self._max_age_s))
            except OSError:
                frozen = True
            if frozen:
                self._cameras[name].close()
                self._cameras[name] = Camera(name, settings)
                log.warning("camera %s: opened anew", name)
            self._frozen[name].forget()

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
