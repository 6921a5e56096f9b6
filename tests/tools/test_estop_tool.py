"""tools/estop.py against the latch that actors look at."""

import os
import subprocess
import sys
import time

import estop as tool

from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard


def reason(run):
    """What an actor of the run would say."""
    estop = EmergencyStop(run / "estop")
    estop.close()
    return estop.reason()


def test_it_presses_and_resets_the_latch_of_a_run(tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 0
    pressed = reason(tmp_path)
    assert " at 20" in pressed
    assert tool.main([str(tmp_path)]) == 0  # the first press stays
    assert reason(tmp_path) == pressed
    assert tool.main([str(tmp_path), "--reset"]) == 0
    assert reason(tmp_path) is None
    said = capsys.readouterr().out
    assert "--reset" in said
    assert "no actor of this run is running on this host" in said


def test_it_says_which_actor_stopped_and_which_does_not_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "ANSWER_S", 0.5)
    alive, deaf, dead = (EmergencyStop(tmp_path / "estop", name) for name in ("robot-1", "robot-2", "robot-3"))
    guard = RobotGuard(None, alive, rate_hz=20, stop_s=None)
    while len(list((tmp_path / "estop.heard").glob("*"))) < 3:
        time.sleep(0.01)
    dead.close()
    assert tool.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"robot-1 (pid {os.getpid()}) has stopped" in said
    assert "robot-2 DOES NOT ANSWER" in said
    assert "robot-3" not in said
    guard.close()
    for estop in (alive, deaf):
        estop.close()


def test_it_needs_no_environment(tmp_path, repo_root):
    command = [
        sys.executable,
        "-I",
        "-S",
        repo_root / "tools" / "estop.py",
        tmp_path,
    ]  # no site-packages, no PYTHONPATH
    for words, latched in ((), True), (("--reset",), False):
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "")
        assert (reason(tmp_path) is not None) == latched


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert tool.main([str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
