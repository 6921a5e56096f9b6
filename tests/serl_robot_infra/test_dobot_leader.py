"""The X-Trainer's leader arms: servos and buttons that speak as real ones, matched to the robot before they drive."""

import time

import numpy as np
import pytest
from dobot_rig import DobotRig
from fake_dobot import HOME
from omegaconf import OmegaConf

from serl_robot_infra.interventions.base import OperatorGoneError, Words
from serl_robot_infra.interventions.dobot_leader import DobotLeader
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

HOME_STATE = np.float32([*np.radians(HOME["left"]), 1.0, *np.radians(HOME["right"]), 1.0])


class Env:
    """What an operator needs of an environment."""

    def __init__(self, spec):
        self.spec = TaskSpec.from_dict(OmegaConf.to_container(spec, resolve=True))


@pytest.fixture
def leaders(tmp_path):
    """(the operator, the rig); only its leaders are used."""
    with DobotRig(tmp_path, "operator.match_speed=0.5", "operator.max_age_ms=1000") as rig:
        operator = build(rig)
        yield operator, rig
        operator.close()


def build(rig, **changes):
    node = {key: value for key, value in rig.task.operator.items() if key != "_target_"}
    return DobotLeader(Env(rig.task.spec), **(node | changes))


def home(side, offset):
    """rad"""
    return np.add(np.radians(HOME[side]), offset)


def seen(state):
    return Observation({}, np.float32(state))


def policy():
    return np.full(14, 7.0, np.float32)


def press(leader, button, seconds=0.06):
    leader.pressed.add(button)
    time.sleep(seconds)
    leader.pressed.discard(button)
    time.sleep(0.06)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_button_a_takes_over_the_robot_goes_to_the_leaders_and_they_are_free(leaders):
    operator, rig = leaders
    assert operator.vocabulary == ("success", "failure", "discard", "ready")
    assert "left a button: take over, let go" in operator.describe()
    operator.reset(np.random.default_rng(0), from_start=False)
    left = home("left", [0.3, 0, 0, 0, 0, 0])
    rig.leaders["left"].put(left, 0.5)
    time.sleep(0.05)
    np.testing.assert_array_equal(operator.act(seen(HOME_STATE), policy, 0)[0], policy())
    assert rig.leaders["left"].locked == {1}

    press(rig.leaders["left"], "a")
    state, steps = HOME_STATE.copy(), []
    for tick in range(1, 16):
        action, mine = operator.act(seen(state), policy, tick)
        assert mine
        steps.append(action[0] - state[0])
        state = action
    np.testing.assert_allclose(state, np.float32([*left, 0.5, *HOME_STATE[7:]]), atol=2e-3)
    assert max(steps) <= 0.5 / 20 + 0.06 + 1e-6  # match_speed, and the last step within match_tolerance
    until(lambda: rig.leaders["left"].locked == rig.leaders["right"].locked == {0})
    rig.leaders["right"].put(home("right", [0, 0.1, 0, 0, 0, 0]), 0.0)
    time.sleep(0.05)
    action, _ = operator.act(seen(state), policy, 16)
    np.testing.assert_allclose(action[[8, 13]], [0.1, 0.0], atol=2e-3)

    press(rig.leaders["right"], "a")
    assert operator.act(seen(state), policy, 17)[1] is False
    until(lambda: rig.leaders["left"].locked == rig.leaders["right"].locked == {1})


def test_a_leader_that_reads_a_turn_further_is_taken_for_the_same_pose(leaders):
    operator, rig = leaders
    rig.leaders["left"].put(home("left", [2 * np.pi, 0, 0, -2 * np.pi, 0, 0]), 1.0)
    time.sleep(0.05)
    operator.reset(np.random.default_rng(0), from_start=True)
    action, mine = operator.act(seen(HOME_STATE), policy, 0)
    assert mine
    np.testing.assert_allclose(action, HOME_STATE, atol=2e-3)


def test_buttons_say_what_the_yaml_says(leaders):
    operator, rig = leaders
    press(rig.leaders["left"], "b")
    press(rig.leaders["right"], "b")
    assert operator.words() == Words(success=True, ready=True)
    assert operator.words() == Words()
    press(rig.leaders["right"], "b", 0.9)
    assert operator.words() == Words(discard=True)
    for locked in ({0}, {1}):  # to put them somewhere while they do not drive
        press(rig.leaders["left"], "a", 0.9)
        assert operator.words() == Words()
        until(lambda locked=locked: rig.leaders["left"].locked == rig.leaders["right"].locked == locked)
    with pytest.raises(ValueError, match=r"buttons\.success: no button 'left_c'; did you mean"):
        build(rig, buttons={"success": "left_c"})
    with pytest.raises(ValueError, match=r"buttons\.ready: left_b is success already"):
        build(rig, buttons={"success": "left_b", "ready": "left_b"})
    with pytest.raises(ValueError, match=r"buttons\.sucess: unknown; did you mean 'success'"):
        build(rig, buttons={"sucess": "left_b"})


def test_a_leader_that_is_unplugged_ends_the_episode_and_comes_back(leaders):
    operator, rig = leaders
    operator.reset(np.random.default_rng(0), from_start=True)
    rig.leaders["left"].corrupt = 2
    operator.act(seen(HOME_STATE), policy, 0)
    rig.leaders["left"].unplug()
    until(lambda: operator.missing() is not None)
    with pytest.raises(OperatorGoneError, match=r"left leader: .*leader_left"):
        operator.act(seen(HOME_STATE), policy, 1)
    rig.leaders["left"].plug()
    until(lambda: operator.missing() is None)
    operator.act(seen(HOME_STATE), policy, 2)


def test_a_leader_that_is_not_there_or_does_not_fit_is_refused_in_one_line(tmp_path):
    with DobotRig(tmp_path) as rig:
        arms = OmegaConf.to_container(rig.task.operator.arms)
        with pytest.raises(ValueError, match="no leader moves 'right_joint1'"):
            build(rig, arms={"left": arms["left"]})
        with pytest.raises(ValueError, match=r"arms\.left: signs: expected 1 or -1"):
            build(rig, arms=arms | {"left": arms["left"] | {"signs": [1, 1, 1, 1, 1, 0]}})
        with pytest.raises(ValueError, match="eight different numbers"):
            build(rig, arms=arms | {"left": arms["left"] | {"second_id": 4}})
        with pytest.raises(ConnectionError, match=r"task\.operator: left leader: /dev/nothing: no such port"):
            build(rig, arms=arms | {"left": arms["left"] | {"port": "/dev/nothing"}})
