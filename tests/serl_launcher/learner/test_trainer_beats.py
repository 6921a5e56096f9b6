"""The trainer shows that it works, and announces what takes long: the real one, looked at as the supervisor does."""

import os
import time
from concurrent.futures import wait

import pytest
from trainer_rig import make, put

from serl_launcher.run import alive
from serl_launcher.run.alive import BEAT_FILE, SIZE, Beat
from serl_launcher.supervisor.pulse import Pulse


@pytest.fixture
def beat(monkeypatch):
    """beat(): the newest one of this process."""
    memory = Pulse()
    monkeypatch.setenv(BEAT_FILE, memory.path)
    monkeypatch.setattr(alive, "_heart", None)
    return lambda: Beat.decode(os.pread(memory._memory.fileno(), SIZE, 0))


def test_each_part_that_may_take_long_is_announced_with_time_enough(tmp_path, ring, beat, monkeypatch):
    put(ring, 0)
    trainer, gateway = make(tmp_path, ring, steps=4)
    seen: dict[str, list[tuple[str, float]]] = {}

    def watched(owner, name):
        real = getattr(owner, name)

        def call(*words, **more):
            now = beat()
            seen.setdefault(name, []).append((now.doing, now.allowed_s))
            return real(*words, **more)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr("serl_launcher.learner.publisher.publish", lambda *_, **__: seen.setdefault(
        "publish", []).append((beat().doing, beat().allowed_s)))  # fmt: skip
    monkeypatch.setattr("serl_launcher.learner.checkpoint.save", lambda *_, **__: time.sleep(0.1))
    monkeypatch.setattr("serl_launcher.learner.disk.wait", lambda threads: seen.setdefault(
        "finish", []).append((beat().doing, beat().allowed_s)) or wait(threads))  # fmt: skip
    watched(trainer.learner, "step")
    watched(trainer.data, "sample")
    watched(trainer.data, "refresh")
    watched(gateway, "progress")
    watched(trainer.publisher, "check_frozen")
    trainer.run()
    assert {name: found[0] for name, found in seen.items()} == {
        "progress": ("waiting for the gateway", 90.0),
        "refresh": ("judging the episodes of the ring", 600.0),
        "sample": ("a training step", 600.0),  # the first one may compile
        "step": ("a training step", 600.0),
        "publish": ("publishing a version", 600.0),
        "finish": ("waiting for a version or checkpoint", 1800.0),
        "check_frozen": ("ending", 1800.0),
    }
    assert seen["step"][1:] == [("a training step", 30.0)] * 3
    assert beat().doing == ""


def test_a_trainer_that_waits_beats(tmp_path, ring, beat):
    trainer, gateway = make(tmp_path, ring, steps=4, limit=3)  # no episode is there
    before = beat().count
    trainer.run()
    assert len(gateway.reports) == 3
    assert beat().count > before + 6
