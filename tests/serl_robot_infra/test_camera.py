"""A camera of a driver's own: fresh pictures, what ails it told at once, opened anew for the next episode."""

import threading
import time

import numpy as np
import pytest

from serl_robot_infra.envs import camera as camera_module
from serl_robot_infra.envs.base import PartLostError
from serl_robot_infra.envs.camera import FreshCamera


class Webcam:
    """200 pictures a second, each another; `state` is what ails all of its kind."""

    state = "well"
    opened: list["Webcam"] = []

    def __init__(self):
        if Webcam.state == "unplugged":
            raise OSError("no such device")
        self.closed, self._count = threading.Event(), 0
        Webcam.opened.append(self)

    def read(self):
        time.sleep(0.005)
        if Webcam.state == "hangs" and self is Webcam.opened[0]:
            self.closed.wait(10)
        if Webcam.state == "unplugged":
            raise OSError("no such device")
        self._count += Webcam.state != "frozen"
        return np.full((2, 2, 3), self._count % 256, np.uint8)

    def close(self):
        self.closed.set()


@pytest.fixture
def camera():
    Webcam.state, Webcam.opened = "well", []
    made = FreshCamera("front", Webcam, max_age_ms=100, frozen_s=0.2)
    yield made
    made.close()
    assert all(device.closed.is_set() for device in Webcam.opened)


def lost_within(camera, seconds):
    """Reads as a control loop does; what was said, and after how long."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            camera.read()
        except PartLostError as lost:
            return str(lost), time.monotonic() - began
        time.sleep(0.01)
    raise AssertionError("it was never told")


def test_pictures_are_fresh_and_do_not_wait(camera):
    first = camera.read()
    time.sleep(0.05)
    began = time.monotonic()
    assert not np.array_equal(camera.read(), first)
    assert time.monotonic() - began < 0.05
    camera.ready()
    assert len(Webcam.opened) == 1  # what is well is not opened anew


@pytest.mark.parametrize(
    ("state", "limit_s", "words"),
    [
        ("hangs", 0.1, "camera front: no picture for 1"),
        ("frozen", 0.2, "camera front: the same picture for 0.2 s"),
        ("unplugged", 0.0, "camera front: OSError: no such device"),
    ],
)
def test_what_ails_it_is_told_in_its_time_and_the_next_episode_opens_it_anew(camera, state, limit_s, words):
    Webcam.state = state
    said, after_s = lost_within(camera, 3.0)
    assert said.startswith(words)
    assert limit_s - 0.02 < after_s < limit_s + 0.5  # its limit, a period of the loop, and this machine's load
    with pytest.raises(PartLostError):
        camera.read()
    Webcam.state = "well"
    camera.ready()
    camera.read()
    assert len(Webcam.opened) == 2


def test_one_that_does_not_come_back_is_asked_for_again_each_time(camera, monkeypatch):
    monkeypatch.setattr(camera_module, "OPEN_S", 0.2)
    Webcam.state = "unplugged"
    lost_within(camera, 3.0)
    for _ in range(2):
        with pytest.raises(PartLostError, match="camera front: cannot be opened: OSError: no such device"):
            camera.ready()
    Webcam.state = "well"
    camera.ready()
    assert camera.read().shape == (2, 2, 3)
