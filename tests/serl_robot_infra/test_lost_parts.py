"""A part of a robot that does not answer cuts an episode, and the night goes on; what a driver made of an action."""

import io
from dataclasses import replace

import numpy as np
import pytest
from scripted_learner import RobotPick, ScriptedLearner, actor_config, ticket

from serl_robot_infra.envs.base import PartLostError
from serl_robot_infra.main import main
from serl_robot_infra.safety import SafetyChain, UnsafeTickError
from serl_transport.contract.specs import TaskSpec


class Glitching(RobotPick):
    """Loses its camera in its fourth tick, and once more in the reset after it; then it is mended."""

    def __init__(self):
        super().__init__()
        self._faults = {"step": [4], "reset": [2]}
        self._calls = {"step": 0, "reset": 0}

    def reset(self, seed, *, actuator_noise=0.0):
        self._look("reset")
        return super().reset(seed, actuator_noise=actuator_noise)

    def step(self, action):
        self._look("step")
        return super().step(action)

    def _look(self, what):
        self._calls[what] += 1
        if self._calls[what] in self._faults[what]:
            raise PartLostError(f"camera front: no picture in {what}")


class Absent(RobotPick):
    """Not there when it is made."""

    def __init__(self):
        raise PartLostError("camera front: no such device")


class Bending(RobotPick):
    """Its driver executes half of what it is sent."""

    def step(self, action):
        half = (action * 0.5).astype(np.float32)
        return replace(super().step(half), executed=half)


@pytest.fixture(scope="module")
def spec():
    robot = RobotPick()
    yield robot.spec
    robot.close()


def act(spec, tmp_path, robot, *tickets):
    with ScriptedLearner(spec, tickets) as learner:
        config = actor_config(learner, tmp_path, demo_noise=0.0, watchdog={"enabled": False})  # its holds are others
        config.task.env = {"_target_": f"test_lost_parts.{robot}"}
        stream = io.StringIO()
        code = main(config, stream)
        return code, stream.getvalue(), learner.episodes()


def test_a_lost_part_cuts_the_episode_with_what_was_executed_and_the_next_one_runs(spec, tmp_path):
    code, out, episodes = act(spec, tmp_path, "Glitching", ticket("demo", 1), ticket("demo", 2), ticket("demo", 3))
    assert code == 0, out
    assert [(episode.info.episode_id, episode.n > 3) for episode in episodes] == [("demo-1", False), ("demo-3", True)]
    assert (episodes[0].n, episodes[0].outcome.truncated_by, episodes[1].outcome.success) == (3, "stop", True)
    assert "episode demo-1 cut at tick 3: camera front: no picture in step" in out
    assert "episode demo-2 cut at tick 0: camera front: no picture in reset" in out
    assert len(RobotPick.last.holds) == 2
    assert RobotPick.last.stops == []


def test_what_the_driver_executed_is_recorded(spec, tmp_path):
    code, out, (episode,) = act(spec, tmp_path, "Bending", ticket("demo", 1))
    assert code == 0, out
    sent = np.array([action for _, action in RobotPick.last.sent])
    assert np.array_equal(episode.arrays["action"], sent)
    assert np.abs(sent[:, 3]).max() == 0.5  # the expert's grip is -1 or 1


def chain():
    names = {"state_names": ["x"], "state_low": [-9], "state_high": [9], "action_names": ["x"]}
    numbers = {"action_low": [-9], "action_high": [9], "control_hz": 10.0, "max_ticks": 9, "targets": {"x": "x"}}
    spec = TaskSpec.from_dict({"name": "n", "prompt": "p", "cameras": {}, **names, **numbers})
    return SafetyChain(spec, max_speed={"x": 10.0}, max_acceleration={"x": 5.0})


def test_the_next_limits_start_from_what_was_executed():
    limits, state = chain(), np.float32([0])
    assert limits.filter(np.float32([5]), state, "p") == pytest.approx([0.05])  # 5 per s² in 0.1 s, for 0.1 s
    assert limits.executed(np.float32([0.02])) == pytest.approx([0.02])
    # The last move was 0.02: 0.05 more may be moved now, from 0.02.
    assert limits.filter(np.float32([5]), state, "p") == pytest.approx([0.09])


@pytest.mark.parametrize("executed", [[np.nan], [0.0, 0.0]])
def test_what_was_executed_is_checked(executed):
    limits = chain()
    limits.filter(np.float32([0]), np.float32([0]), "p")
    with pytest.raises(UnsafeTickError, match="executed: action"):
        limits.executed(np.array(executed))


def test_a_part_that_is_not_there_at_the_start_is_one_line_for_a_person(spec, tmp_path):
    """docs/robot.md: whatever the constructor raises, exit 2."""
    code, said, _ = act(spec, tmp_path, "Absent")
    assert code == 2
    assert said.splitlines() == ["actor: error: task.env: camera front: no such device"]
