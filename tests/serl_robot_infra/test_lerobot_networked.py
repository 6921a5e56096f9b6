"""A robot that registers with LeRobot from outside and has no bus of ours: at rest, lost, connected anew."""

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="a robot host without LeRobot's drivers")

from networked_robot import Networked

from serl_robot_infra.envs.base import PartLostError
from serl_robot_infra.envs.lerobot_robot import LeRobotEnv

NETWORKED = {"state_names": ["lift.pos", "x.vel"], "action_names": ["lift.pos", "x.vel"], "cameras": {}}
NETWORKED |= {key: [sign * 9.0] * 2 for key, sign in (("state_low", -1), ("state_high", 1))}
NETWORKED |= {"action_low": [-9.0] * 2, "action_high": [9.0] * 2, "control_hz": 50.0, "max_ticks": 9}
NETWORKED |= {"name": "n", "prompt": "p"}


def test_a_robot_from_outside_without_a_bus_stands_still_and_is_connected_anew(tmp_path):
    env = LeRobotEnv(NETWORKED, {"type": "networked", "calibration_dir": str(tmp_path)}, still={"x.vel": 0.0})
    robot = Networked.last
    env.reset(0)
    env.step(np.float32([6.0, 0.7]))
    env.hold()
    env.stop()
    assert robot.log[1:] == [{"lift.pos": 6.0, "x.vel": pytest.approx(0.7)}] + [{"lift.pos": 6.0, "x.vel": 0.0}] * 2
    robot.up = False
    with pytest.raises(PartLostError):
        env.step(np.float32([6.0, 0.0]))
    with pytest.raises(TimeoutError):
        env.stop()
    robot.up = True
    env.stop()
    assert "disconnect" not in robot.log  # it may take the torque: only where it does not answer in a reset
    env.reset(2)
    assert env.step(np.float32([7.0, 0.0])).observation.state[0] == 7.0
    robot.up = False
    with pytest.raises(PartLostError):
        env.step(np.float32([7.0, 0.0]))
    with pytest.raises(PartLostError):
        env.reset(3)
    robot.up = True
    env.reset(4)
    assert robot.log.count("connect") == 2
    env.close()


def test_an_action_that_is_no_position_needs_its_value_at_rest(tmp_path):
    with pytest.raises(ValueError, match=r"task\.env\.still: 'x\.vel' is no position of a joint"):
        LeRobotEnv(NETWORKED, {"type": "networked", "calibration_dir": str(tmp_path)})
