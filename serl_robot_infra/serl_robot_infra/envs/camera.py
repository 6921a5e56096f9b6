"""Cameras of real robots: read by a thread, never older than a limit, never frozen; opened anew when they are lost.

    open() ─▶ device.read() again and again, a thread ─▶ [newest picture, when it came] ─▶ FreshCamera.read()
                                                     PartLostError: too old, frozen, failed ◀─┘

For drivers of one's own: `reset` of the environment calls `ready`, `step` calls `read`, and whatever is wrong cuts the
episode while the actor goes on. FrozenCheck alone is for cameras with a thread of their own (envs/lerobot_robot.py).
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from serl_robot_infra.envs.base import PartLostError

OPEN_S = 5.0  # for the first picture of a camera that was opened


class Device(Protocol):
    """What a camera's library gives, or a few lines around it."""

    def read(self) -> np.ndarray:
        """The next picture, uint8[h, w, 3], RGB; waits for it. Raises what it likes."""
        ...

    def close(self) -> None:
        """Let go of the device; called from another thread than `read`, which may hang."""
        ...


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


class FreshCamera:
    """Owns a device and the thread that reads it.

    Args:
        name: of the camera, for messages.
        open: makes the device; called again, after `close` of the one before, when that is lost.
        max_age_ms: an older picture is a lost camera.
        frozen_s: so is one that does not change for so long; None: pictures may stand still.

    Raises what `open` raises, and PartLostError when no picture comes within OPEN_S.
    """

    def __init__(
        self, name: str, open: Callable[[], Device], max_age_ms: float = 250.0, frozen_s: float | None = 2.0
    ) -> None:
        self._name, self._open, self._max_age_s = name, open, max_age_ms / 1e3
        self._frozen = FrozenCheck(frozen_s)
        self._lost = False
        self._reader = _Reader(open())
        self._first()

    def ready(self) -> None:
        """For the environment's `reset`: opens anew what was lost. PartLostError: it does not come back."""
        self._frozen.forget()
        if not self._lost and self._reader.age_s() <= self._max_age_s:
            return
        self._reader.close()
        try:
            self._reader = _Reader(self._open())
        except Exception as fault:  # a driver may raise anything
            self._lose(f"cannot be opened: {type(fault).__name__}: {fault}")
        self._first()

    def read(self) -> np.ndarray:
        """The newest picture, uint8[h, w, 3]; does not wait. PartLostError: it is too old or frozen, or the device
        failed."""
        if self._reader.fault is not None:
            self._lose(self._reader.fault)
        if (age_s := self._reader.age_s()) > self._max_age_s:
            self._lose(f"no picture for {age_s * 1e3:.0f} ms")
        image = self._reader.newest()
        if self._frozen.is_frozen(image):
            self._lose(f"the same picture for {self._frozen.limit_s:g} s")
        return image

    def close(self) -> None:
        """Let go of the device; idempotent."""
        self._reader.close()

    def _first(self) -> None:
        if not self._reader.wait(OPEN_S):
            self._reader.close()
            self._lose(self._reader.fault or f"no picture within {OPEN_S:g} s of its opening")
        self._lost = False

    def _lose(self, why: str) -> None:
        self._lost = True
        raise PartLostError(f"camera {self._name}: {why}")


class _Reader:
    """One opened device. A thread that hangs in it is left alone, and what it brings later is nobody's."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.fault: str | None = None  # what `read` raised
        self._newest: tuple[np.ndarray, float] | None = None  # the picture and its time.monotonic()
        self._came = threading.Event()  # the first picture, or the fault
        self._closing = False
        threading.Thread(target=self._run, name="camera", daemon=True).start()

    def age_s(self) -> float:
        """Of the newest picture; infinite before the first."""
        return time.monotonic() - self._newest[1] if self._newest else float("inf")

    def newest(self) -> np.ndarray:
        assert self._newest is not None, "newest before the first picture"
        return self._newest[0]

    def wait(self, seconds: float) -> bool:
        """Until there is a picture; False when none came, or the device failed."""
        return self._came.wait(seconds) and self.fault is None

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(Exception):  # of a device that is gone
            self._device.close()

    def _run(self) -> None:
        try:
            while not self._closing:
                image = self._device.read()
                self._newest = image, time.monotonic()
                self._came.set()
        except Exception as fault:  # a driver may raise anything; told by whoever reads next
            self.fault = f"{type(fault).__name__}: {' '.join(str(fault).split())}"
            self._came.set()
