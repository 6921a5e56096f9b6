"""The e-stop's key: a real actor process at a pseudo-terminal, and the keyboard that it shares with the rewards."""

import os
import subprocess
import sys
import time

import pytest
from robot_rig import PERIOD_S, RobotRig

from serl_robot_infra.keyboard import Keyboard, TerminalGoneError, character_of, terminal_reader
from serl_robot_infra.rewards.human_key import HumanKeyReward


def test_a_key_stops_the_robot_within_one_period_and_it_stays_stopped(tmp_path):
    with RobotRig(tmp_path) as rig:
        rig.start_actor()
        rig.wait_moving()
        assert "e-stop: press space here" in rig.log.read_text()
        rig.press(b"x")  # some other key
        rig.wait_moving()
        pressed = rig.press(b" ")
        rig.wait(lambda: rig.of("s", pressed), "the robot is stopped")
        rig.wait(lambda: "e-stop pressed: the key space" in rig.log.read_text(), "it would have begun the next episode")
        time.sleep(5 * PERIOD_S)
        assert rig.of("s", pressed)[0] - pressed <= PERIOD_S
        assert all(at - pressed <= PERIOD_S for at in rig.of("a", pressed))
        assert rig.of("r", pressed) == []
        assert rig.latch.read_text().startswith("the key space at the actor's terminal at ")
        rig.kill_actor()  # latched: an actor that is started again does not move either
        rig.start_actor()
        rig.wait(lambda: rig.log.read_text().count("e-stop pressed: the key space") >= 2, "the second says so")
        time.sleep(5 * PERIOD_S)
        assert rig.of("r", pressed) == []
        rig.latch.unlink()
        rig.wait_moving()


def test_without_a_terminal_there_is_no_key_and_no_word_of_it(tmp_path):
    with RobotRig(tmp_path) as rig:
        rig.start_actor(terminal=False)
        rig.wait_moving()
        assert "e-stop" not in rig.log.read_text()


def keys(*pressed):
    """Reads these, then nothing, then the terminal is gone."""
    left = list(pressed)

    def read():
        time.sleep(0.001)
        if not left:
            raise TerminalGoneError
        return left.pop(0)

    return read


def test_each_key_has_one_owner(caplog):
    heard = []
    keyboard = Keyboard(keys("a", None, " ", "b", "a"))
    keyboard.on("a", lambda: heard.append("a"), "one")
    with pytest.raises(ValueError, match="two: the key 'a' is one already; name another one"):
        keyboard.on("a", lambda: None, "two")
    keyboard._thread.join(10)
    assert set(heard) == {"a"}
    assert "the terminal was closed" in caplog.text
    assert character_of("space", "x") == " "
    with pytest.raises(ValueError, match=r"rollout\.estop_key: expected one character or space, enter, esc"):
        character_of("F1", "rollout.estop_key")


def test_the_keys_terminal_is_read_by_a_descriptor_of_its_own():
    """What is opened after the caller closed its descriptor, under the same number, is not read."""
    master, slave = os.openpty()
    file = os.dup(slave)
    read = terminal_reader(file)
    os.close(file)
    mine, other = os.pipe()
    assert file in (mine, other)
    os.write(other, b"not a key")
    assert read() is None
    os.write(master, b"\r")  # what a terminal sends for return in this mode
    assert read() == character_of("enter", "x")
    for descriptor in (master, slave, mine, other):
        os.close(descriptor)
    with pytest.raises(TerminalGoneError):
        read()


def test_a_persons_judgement_and_the_estop_cannot_share_a_key(monkeypatch):
    master, slave = os.openpty()
    try:
        with os.fdopen(os.dup(slave)) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            HumanKeyReward("s", "f")
            from serl_robot_infra.keyboard import terminal_keyboard

            with pytest.raises(ValueError, match=r"rollout\.estop_key: the key 's' is reward\.success_key already"):
                terminal_keyboard().on("s", lambda: None, "rollout.estop_key")
    finally:
        os.close(master)
        os.close(slave)


def test_the_tool_waits_for_a_key_with_any_python_alone(tmp_path, repo_root):
    master, slave = os.openpty()
    command = [sys.executable, "-I", "-S", repo_root / "tools" / "estop.py", tmp_path, "--key"]  # no site-packages
    tool = subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert "any key stops the robots" in tool.stdout.readline()
        assert not (tmp_path / "estop").exists()
        os.write(master, b"x")
        assert "pressed; reset with: python3 tools/estop.py" in tool.stdout.readline()
        assert " at 20" in (tmp_path / "estop").read_text()
        os.close(slave)
        os.close(master)  # the terminal is closed
        assert tool.wait(10) == 0
    finally:
        tool.kill()
        tool.wait()
        tool.stdout.close()


def test_the_tool_needs_a_terminal_for_its_key(tmp_path, repo_root):
    command = [sys.executable, "-I", "-S", repo_root / "tools" / "estop.py", tmp_path, "--key"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "--key needs a terminal" in done.stderr
