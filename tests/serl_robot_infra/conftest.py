"""Fixtures of the robot side."""

import os

import pytest
from scripted_learner import RobotPick
from typist import Typist

from serl_robot_infra import keyboard


@pytest.fixture
def typist(monkeypatch):
    """A terminal of this test's own."""
    master, slave = os.openpty()
    monkeypatch.setattr(keyboard, "_terminal", [])
    monkeypatch.setattr(RobotPick, "last", None)
    with open(os.dup(slave)) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        person = Typist(master)
        yield person
    os.close(slave)
    if person._master >= 0:
        person.hang_up()
