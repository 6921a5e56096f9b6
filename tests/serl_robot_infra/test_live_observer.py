"""What the actor shows at the console: small pictures on a thread of their own, and only while somebody looks."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from serl_robot_infra.observers import live
from serl_robot_infra.observers.console import Vitals
from serl_robot_infra.observers.live import LiveObserver, small_jpeg
from serl_transport.contract.errors import ServerSilent
from serl_transport.contract.schema import EpisodeInfo, Observation, TimeStep

INFO = EpisodeInfo("e1", "actor-0", "boot", "pick", "do it", "online", "online", 7, 1.5)


class Link:
    """Keeps what was sent; silent at first."""

    def __init__(self):
        self.watched, self.sent, self.failures = False, [], 1

    def request(self, type, payload, *, timeout_ms):
        if self.failures:
            self.failures -= 1
            raise ServerSilent("nobody")
        self.sent.append((type, payload))
        return {}


@pytest.fixture
def observer(monkeypatch):
    monkeypatch.setattr(live, "UNWATCHED_S", 0.01)
    monkeypatch.setattr(live, "AGAIN_S", 0.01)
    monkeypatch.setattr(live, "PERIOD_S", 0.02)
    link = Link()
    made = LiveObserver(link, lambda: Vitals(infer_p50_ms=12.0, backlog=2, overruns=1, refused=0))
    made.link = link
    yield made
    made.close()


def step(intervention=False, value=200):
    images = {"front": np.full((240, 320, 3), value, np.uint8), "wrist": np.full((64, 48, 3), value, np.uint8)}
    return TimeStep(Observation(images, np.zeros(5, np.float32)), np.zeros(4, np.float32), 0.5, False, False, False,
                    intervention, 7, 1)  # fmt: skip


def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_nothing_is_sent_while_nobody_looks_and_a_silent_learner_costs_one_picture(observer):
    observer.episode_started(INFO)
    observer.tick(step())
    time.sleep(0.1)
    assert (observer.link.sent, observer.link.failures) == ([], 1)
    observer.link.watched = True
    until(lambda: len(observer.link.sent) > 2)
    kind, body = observer.link.sent[-1]
    assert kind == "live"
    with Image.open(io.BytesIO(body["pictures"]["front"])) as picture:
        assert (picture.format, picture.size) == ("JPEG", (160, 120))
        assert abs(picture.getpixel((80, 60))[0] - 200) < 3
    with Image.open(io.BytesIO(body["pictures"]["wrist"])) as picture:
        assert picture.size == (48, 64)  # small ones stay as they are
    observer.link.watched = False
    time.sleep(0.1)
    sent = len(observer.link.sent)
    time.sleep(0.1)
    assert len(observer.link.sent) == sent


def test_who_drives_and_what_is_waited_for(observer):
    assert (observer.body()["driver"], observer.body()["pictures"]) == (None, {})
    observer.episode_started(INFO)
    observer.trouble("waiting for the operator: the gamepad is gone")
    assert observer.body()["says"] == "waiting for the operator: the gamepad is gone"
    observer.tick(step(intervention=True))
    observer.tick(step(intervention=True))
    body = observer.body()
    assert (body["driver"], body["tick"], body["return"], body["says"]) == ("operator", 2, 1.0, None)
    assert (body["stage"], body["infer_ms"], body["backlog"]) == ("online", 12.0, 2)
    observer.tick(step())
    assert observer.body()["driver"] == "policy"
    observer.message("learner silent for 3 s; holding")
    assert observer.body()["says"].startswith("learner silent")
    observer._said_at -= live.SAID_S
    assert observer.body()["says"] is None


def test_a_picture_of_a_camera_is_small():
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    assert len(small_jpeg(noise)) < 16_000
