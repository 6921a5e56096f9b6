"""What the actor's console says of the learner while the loop does something else: silence, its end, roles that ail."""

import time
from dataclasses import dataclass, field

import pytest

from serl_robot_infra.observers import learner_watch
from serl_robot_infra.observers.learner_watch import LearnerWatch, watching


@dataclass
class Link:
    silent_s: float = 0.0
    troubles: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_silence_is_told_with_its_beginning_and_its_end(clock):
    link, lines = Link(), []
    watch = LearnerWatch(link, lines.append)
    watch.look()
    assert lines == []
    clock[0], link.silent_s = 1010.0, 12.0
    watch.look()
    assert lines[0].startswith("learner silent for 12 s, since ")
    clock[0], link.silent_s = 1020.0, 22.0
    watch.look()
    assert lines[1].startswith("learner silent for 22 s, since ")
    assert lines[0].split("since")[1] == lines[1].split("since")[1]
    clock[0], link.silent_s = 1021.0, 0.5
    watch.look()
    assert lines[2:] == ["the learner answers again, after 22 s"]
    watch.look()
    assert len(lines) == 3


def test_a_role_s_trouble_is_told_when_it_changes_and_now_and_then(clock):
    link, lines = Link(troubles={"trainer": "silent for 6 s"}), []
    watch = LearnerWatch(link, lines.append)
    for second in range(7, 67):
        watch.look()
        clock[0] += 1.0
        link.troubles = {"trainer": f"silent for {second} s"}
    watch.look()
    clock[0] += 1.0
    watch.look()
    assert lines == ["learner: trainer silent for 6 s", "learner: trainer silent for 66 s"]
    link.troubles = {"trainer": "started again, after it ended (killed)", "exporter": "ended (exit code 1)"}
    watch.look()
    assert lines[2:] == [
        "learner: trainer started again, after it ended (killed)",
        "learner: exporter ended (exit code 1)",
    ]
    link.troubles = {"exporter": "ended (exit code 1)"}
    watch.look()
    assert lines[4:] == ["learner: trainer is well again"]


def test_it_speaks_while_the_loop_is_held_up(monkeypatch):
    monkeypatch.setattr(learner_watch, "LOOK_S", 0.01)
    lines = []
    with watching(Link(silent_s=5.0), lines.append):
        deadline = time.monotonic() + 30
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines
    count = len(lines)
    time.sleep(0.1)
    assert len(lines) == count  # and no longer
