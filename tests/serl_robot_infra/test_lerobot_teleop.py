"""LeRobot's teleoperators as operators: its own leader arms on servos that speak as real ones, its gamepad's events."""

import types

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="a robot host without LeRobot's drivers")
pytest.importorskip("scservo_sdk", reason="the lerobot extra is not installed")

from lerobot.teleoperators.gamepad import gamepad_utils
from lerobot.teleoperators.utils import TeleopEvents
from lerobot_rig import Rig

from serl_robot_infra import lerobot_devices
from serl_robot_infra.envs.base import PartLostError
from serl_robot_infra.interventions import lerobot_teleop
from serl_robot_infra.interventions.base import Words
from serl_robot_infra.interventions.lerobot_teleop import LeRobotTeleop
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

DEGREES = {"use_degrees": True}
# type -> (its yaml beside id and port, arms): every leader that LeRobot 0.6.1 reads over a serial line of servos.
LEADERS = {
    "so100_leader": (DEGREES, 1),
    "so101_leader": (DEGREES, 1),
    "koch_leader": ({}, 1),
    "omx_leader": ({}, 1),
    "openarm_mini": (DEGREES | {"side": "left"}, 1),
    "bi_so_leader": ({"left_arm_config": DEGREES, "right_arm_config": DEGREES}, 2),
    "bi_openarm_mini": (
        {"left_arm_config": DEGREES | {"side": "left"}, "right_arm_config": DEGREES | {"side": "right"}},
        2,
    ),
}
RNG = np.random.default_rng(0)


def env_of(names, states=None, **more):
    """What an operator needs of an environment."""
    states = list(names if states is None else states)
    spec = {
        "name": "arm", "prompt": "move", "cameras": {}, "state_names": states, "action_names": list(names),
        "state_low": [-1e3] * len(states), "state_high": [1e3] * len(states),
        "action_low": [-1e3] * len(names), "action_high": [1e3] * len(names), "control_hz": 10.0, "max_ticks": 9,
    }  # fmt: skip
    return types.SimpleNamespace(spec=TaskSpec.from_dict(spec), **more)


def at(state):
    return Observation({}, np.asarray(state, np.float32))


def policy():
    return np.full(3, 7.0, np.float32)


@pytest.fixture(params=list(LEADERS))
def rig(request, tmp_path):
    more, arms = LEADERS[request.param]
    with Rig(tmp_path, lerobot_devices.make_teleoperator, {"type": request.param, **more}, arms) as rig:
        yield rig


def names_of(rig):
    return lerobot_devices.feature_names(lerobot_devices.make_teleoperator(rig.node).action_features)


def test_contract(rig):
    env = env_of(names_of(rig))
    operator = LeRobotTeleop(env, rig.node, match_speed=10.0, match_tolerance=2.0)
    torque = {servo.get("Torque_Enable") for chain in rig.chains for servo in chain.servos.values()}
    operator.reset(RNG, from_start=False)
    action, drives = operator.act(at(np.zeros(env.spec.state_dim)), lambda: np.zeros(env.spec.action_dim), 0)
    assert (drives, action.any(), operator.words()) == (False, False, Words())

    operator.reset(RNG, from_start=True)
    leader, _ = follow(operator, at(np.zeros(env.spec.state_dim)), 200)
    env.spec.check_action(leader)
    rig.unplug()
    with pytest.raises(PartLostError, match=rig.node["type"]):
        operator.act(at(leader), policy, 1)
    with pytest.raises(PartLostError, match=rig.node["type"]):
        operator.act(at(leader), policy, 2)
    rig.plug()
    again, drives = operator.act(at(leader), policy, 3)
    assert drives
    assert np.abs(again - leader).max() < 1.0
    assert {servo.get("Torque_Enable") for chain in rig.chains for servo in chain.servos.values()} == torque
    operator.close()
    operator.close()


def follow(operator, seen, ticks):
    """The last of so many actions, and all of them."""
    actions = [operator.act(seen, policy, tick)[0] for tick in range(ticks)]
    return actions[-1], np.array(actions)


@pytest.fixture
def leader(tmp_path, monkeypatch):
    """An SO-101 leader at 60 degrees in one joint, with a key to take over; (rig, operator, press)."""
    keys = {}
    keyboard = types.SimpleNamespace(on=lambda key, fn, owner: keys.update({key: fn}))
    monkeypatch.setattr(lerobot_teleop, "terminal_keyboard", lambda: keyboard)
    node = {"type": "so101_leader", **DEGREES}
    with Rig(tmp_path, lerobot_devices.make_teleoperator, node) as rig:
        rig.chains[0].servos[1].set("Present_Position", 2047 + 683)
        operator = LeRobotTeleop(env_of(names_of(rig)), rig.node, match_speed=100.0, match_tolerance=2.0)
        yield rig, operator, lambda: keys["enter"]()
        operator.close()


def test_the_arm_goes_to_the_leader_before_it_follows_it(leader, caplog):
    rig, operator, press = leader
    operator.reset(RNG, from_start=False)
    follower = at([0, 0, 0, 0, 0, 50])
    assert operator.act(follower, policy, 0)[1] is False
    press()
    _, actions = follow(operator, follower, 8)
    # 100 degrees per second at 10 Hz are 10 a tick: six ticks to 60, from where the arm is.
    assert actions[:5, 0] == pytest.approx([10, 20, 30, 40, 50], abs=0.1)
    assert actions[-1, 0] == pytest.approx(60, abs=0.1)
    assert (
        "the arm goes to the leader at 100 units per second, then follows it: shoulder_pan.pos is 60 away"
        in caplog.text
    )
    rig.chains[0].servos[1].set("Present_Position", 2047 + 341)
    assert operator.act(follower, policy, 9)[0][0] == pytest.approx(30, abs=0.1)  # it follows at once now
    press()
    assert operator.act(follower, policy, 10)[1] is False
    press()
    assert operator.act(follower, policy, 11)[0][0] == pytest.approx(10, abs=0.1)  # and anew, from the arm


def test_a_new_episode_is_the_policys(leader):
    _, operator, press = leader
    press()
    operator.reset(RNG, from_start=False)
    assert operator.act(at(np.zeros(6)), policy, 0)[1] is False
    assert operator.describe() == ("enter: take over with the so101_leader, let go",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rig: LeRobotTeleop(env_of(names_of(rig), ["x"]), rig.node), "'shoulder_pan.pos' is missing"),
        (lambda rig: LeRobotTeleop(env_of(names_of(rig), uses_degrees=False), rig.node), "use_degrees: expected false"),
        (lambda rig: LeRobotTeleop(env_of(["dx"]), rig.node), "task.operator.axes.dx: the teleoperator has no 'dx'"),
        (lambda rig: LeRobotTeleop(env_of(["dx"]), rig.node, {"dy": {}}), "axes.dy: the task has no such action"),
        (lambda rig: LeRobotTeleop(env_of(["dx"]), rig.node, {"dx": {"kee": "a"}}), "axes.dx: expected key, scale"),
        (lambda rig: LeRobotTeleop(env_of(names_of(rig)), rig.node, match_speed=0), "match_speed: expected a number"),
        (lambda rig: LeRobotTeleop(env_of(names_of(rig)), {**rig.node, "id": "new"}), "--teleop.id=new"),
        (lambda rig: LeRobotTeleop(env_of(["a"]), {"type": "so101_leadr"}), "did you mean 'so101_leader'"),
        (lambda rig: LeRobotTeleop(env_of(["delta_x"]), {"type": "keyboard_ee"}), "did not come up"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(leader, make, message):
    with pytest.raises((ValueError, OSError)) as caught:
        make(leader[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class FakeGamepad:
    """In the place of LeRobot's reader of a gamepad: what a person's hand does."""

    deltas, command, holds, said = (0.0, 0.0, 0.0), "stay", False, None

    def start(self):
        FakeGamepad.deltas, FakeGamepad.command, FakeGamepad.holds, FakeGamepad.said = (
            (0.0, 0.0, 0.0),
            "stay",
            False,
            None,
        )

    def update(self): ...

    def stop(self): ...

    def get_deltas(self):
        return self.deltas

    def gripper_command(self):
        return self.command

    def should_intervene(self):
        return self.holds

    def get_episode_end_status(self):
        said, FakeGamepad.said = FakeGamepad.said, None
        return said


@pytest.fixture
def gamepad(monkeypatch):
    monkeypatch.setattr(gamepad_utils, "GamepadController", FakeGamepad)
    axes = {name: {"key": f"delta_{name[1]}", "scale": 0.025} for name in ("dx", "dy", "dz")}
    axes["grip"] = {"key": "gripper", "scale": -1.0, "offset": 1.0, "keep": 1}
    env = env_of(["dx", "dy", "dz", "grip"], states=["x"])
    operator = LeRobotTeleop(env, {"type": "gamepad"}, axes=axes)
    operator.reset(RNG, from_start=False)
    return operator


def test_a_gamepad_drives_while_its_button_is_held_and_the_gripper_stays(gamepad):
    seen = at([0])
    assert gamepad.act(seen, policy, 0)[1] is False
    FakeGamepad.holds, FakeGamepad.deltas, FakeGamepad.command = True, (1.0, -0.5, 0.0), "close"
    action, drives = gamepad.act(seen, policy, 1)
    assert (action.tolist(), drives) == (pytest.approx([0.025, -0.0125, 0.0, 1.0]), True)
    FakeGamepad.command = "stay"
    assert gamepad.act(seen, policy, 2)[0][3] == 1.0
    FakeGamepad.command = "open"
    assert gamepad.act(seen, policy, 3)[0][3] == -1.0
    FakeGamepad.holds = False
    assert gamepad.act(seen, policy, 4)[1] is False


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (TeleopEvents.SUCCESS, Words(success=True)),
        (TeleopEvents.FAILURE, Words(failure=True)),
        (TeleopEvents.RERECORD_EPISODE, Words(discard=True)),
        (None, Words()),
    ],
)
def test_its_events_are_a_persons_words_once(gamepad, event, words):
    FakeGamepad.said = event
    gamepad.act(at([0]), policy, 0)
    gamepad.act(at([0]), policy, 1)  # a word is kept until it is asked for
    assert gamepad.words() == words
    assert gamepad.words() == Words()
    FakeGamepad.said = event
    assert gamepad.words() == words  # between episodes nobody calls act


def test_what_was_said_before_an_episode_is_forgotten(gamepad):
    FakeGamepad.said = TeleopEvents.SUCCESS
    gamepad.act(at([0]), policy, 0)
    gamepad.reset(RNG, from_start=True)
    assert gamepad.act(at([0]), policy, 0)[1] is True
    assert gamepad.words() == Words()
    assert "its own buttons" in gamepad.describe()[0]
