"""A camera as OpenCV shows it (cv2.VideoCapture): LeRobot's own OpenCVCamera and its reading thread run on it."""

import time

import cv2
import numpy as np


class FakeCapture:
    """Frames of noise at the asked size and rate; `devices` are plugged in, `frozen` ones give one picture for ever."""

    devices: set = set()
    frozen: set = set()

    def __init__(self, index, backend=0):
        self._index, self._open = index, index in self.devices
        self._settings = {cv2.CAP_PROP_FRAME_WIDTH: 64.0, cv2.CAP_PROP_FRAME_HEIGHT: 48.0, cv2.CAP_PROP_FPS: 60.0}
        self._rng, self._last = np.random.default_rng(0), None

    def isOpened(self):  # noqa: N802
        return self._open

    def set(self, key, value):
        self._settings[key] = value
        return True

    def get(self, key):
        return self._settings[key]

    def read(self):
        time.sleep(1 / self._settings[cv2.CAP_PROP_FPS])
        if self._index not in self.devices:
            return False, None
        if self._last is None or self._index not in self.frozen:
            size = (int(self._settings[cv2.CAP_PROP_FRAME_HEIGHT]), int(self._settings[cv2.CAP_PROP_FRAME_WIDTH]), 3)
            self._last = self._rng.integers(0, 255, size, np.uint8)
        return True, self._last

    def release(self):
        self._open = False
