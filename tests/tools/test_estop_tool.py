"""tools/estop.py against the latch that actors look at."""

import subprocess
import sys

import estop as tool

from serl_robot_infra.estop import EmergencyStop


def test_it_presses_and_resets_the_latch_of_a_run(tmp_path, capsys):
    latch = EmergencyStop(tmp_path / "estop")
    assert tool.main([str(tmp_path)]) == 0
    pressed = latch.reason()
    assert " at 20" in pressed
    assert tool.main([str(tmp_path)]) == 0  # the first press stays
    assert latch.reason() == pressed
    assert tool.main([str(tmp_path), "--reset"]) == 0
    assert latch.reason() is None
    assert "--reset" in capsys.readouterr().out


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
        assert (EmergencyStop(tmp_path / "estop").reason() is not None) == latched


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert tool.main([str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
