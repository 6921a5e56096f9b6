"""tools/estop.py against the latch that actors look at."""

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


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert tool.main([str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
