"""Fixtures of the robot side."""

import os
from contextlib import ExitStack

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


@pytest.fixture
def xtrainer(tmp_path, monkeypatch):
    """Made with words of the command line after `task.`: (the environment, its rig). Its gripper is a thread of this
    process, which a busy machine lets answer later than a servo would."""
    from serl_robot_infra.envs.dobot import gripper

    monkeypatch.setattr(gripper, "_ANSWER_S", 0.25)
    from dobot_rig import FAST, DobotRig  # brings OpenCV

    with ExitStack() as stack:

        def make(*words, **options):
            rig = stack.enter_context(DobotRig(tmp_path, *FAST, *words, **options))
            env = rig.build()
            stack.callback(env.close)
            return env, rig

        yield make
