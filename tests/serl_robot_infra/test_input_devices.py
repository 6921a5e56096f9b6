"""Gamepad and SpaceMouse: evdev's reader on the kernel's event structs, with the yaml's own mapping."""

import time

import numpy as np
import pytest
from kernel_device import FakeDevice, gamepad, spacemouse
from scripted_learner import RobotPick, ScriptedLearner, ticket
from typist import BY_PAD

from flowserl_cli.compose import load_config
from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.interventions import evdev_device
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_robot_infra.operators import build_operator
from serl_transport.contract.schema import Observation

PROPOSAL = np.float32([0.001, 0, 0, -0.5])
SEEN = Observation({}, np.zeros(5, np.float32))


@pytest.fixture(scope="module")
def env():
    return PickEnv(image_size=32, renderer="ray")


@pytest.fixture
def plug(monkeypatch):
    """Plugs devices in: what /dev/input holds."""
    there = {}

    def change(*devices):
        there.clear()
        there.update({f"/dev/input/event{n}": device for n, device in enumerate(devices)})

    def open_device(path):
        if isinstance(there[path], OSError):
            raise there[path]
        return there[path]

    monkeypatch.setattr(evdev_device.glob, "glob", lambda pattern: list(there))
    monkeypatch.setattr(evdev_device, "open_device", open_device)
    monkeypatch.setattr(evdev_device, "_LOOK_S", 0.0)
    return change


def operator_of(env, *words):
    cfg = load_config(list(words))
    operator = build_operator(cfg, env)
    assert operator.missing() is None  # as before an episode
    operator.reset(np.random.default_rng(0), from_start=False)
    return operator


def act(operator):
    action, by_hand = operator.act(SEEN, lambda: PROPOSAL, 0)
    return [round(value, 6) for value in action.tolist()], by_hand


def test_a_gamepad_drives_while_its_button_is_held_and_keeps_the_gripper(env, plug):
    keyboard_like = FakeDevice("a keyboard", {}, ["KEY_A"])
    pad = gamepad()
    plug(keyboard_like, pad)
    operator = operator_of(env, "operator=gamepad")
    pad.move("ABS_Y", -32768)
    assert act(operator) == ([0.001, 0, 0, -0.5], False)  # a bumped stick moves nothing
    pad.press("BTN_TR")
    assert act(operator) == ([0.0125, 0, 0, -0.5], True)  # pushed away: half of dx's limit; the gripper as it was
    pad.move("ABS_Y", 3000)
    pad.move("ABS_RY", 32767)
    pad.press("BTN_TL")
    pad.press("BTN_TL", down=False)
    action, by_hand = act(operator)
    assert (action, by_hand) == ([0, 0, -0.0125, 1], True)  # the deadband; down; closed
    pad.press("BTN_TR", down=False)
    assert not act(operator)[1]
    pad.press("BTN_NORTH")
    assert operator.words().success
    assert not operator.words().success


def test_what_the_kernel_dropped_is_asked_for_again(env, plug):
    pad = gamepad()
    plug(pad)
    operator = operator_of(env, "operator=gamepad")
    pad.press("BTN_TR")
    pad.move("ABS_X", 32767)
    assert act(operator)[0][1] == -0.0125
    pad.move("ABS_X", 0, quietly=True)
    pad.press("BTN_TR", down=False, quietly=True)
    pad.drop()
    assert not act(operator)[1]
    pad.press("BTN_TR")
    assert act(operator)[0][:3] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["REL", "ABS"])
def test_a_spacemouse_takes_over_when_it_is_touched(env, plug, kind):
    mouse = spacemouse(kind)
    plug(mouse)
    operator = operator_of(env, "operator=spacemouse", "operator.release_s=0.3")
    assert not act(operator)[1]
    mouse.move(f"{kind}_Y", -350)
    mouse.move(f"{kind}_Z", 20)  # within the deadband
    assert act(operator) == ([0.025, 0, 0, -0.5], True)
    if kind == "ABS":
        mouse.move("ABS_Y", 0)
    time.sleep(0.15)  # relative axes say nothing of a cap that is let go
    assert act(operator) == ([0, 0, 0, -0.5], True)
    time.sleep(0.3)
    assert not act(operator)[1]
    mouse.press("BTN_1")  # pinned until it is pressed again
    time.sleep(0.35)
    assert act(operator)[1]
    mouse.press("BTN_1", down=False)
    mouse.press("BTN_1")
    assert not act(operator)[1]


def test_a_device_that_is_pulled_raises_and_is_found_again(env, plug):
    pad = gamepad()
    plug(pad)
    operator = operator_of(env, "operator=gamepad")
    pad.pull()
    plug()
    with pytest.raises(OperatorGoneError, match=r"the gamepad 'Wireless Controller' is gone .* looking for it"):
        act(operator)
    assert operator.missing() == "no gamepad in /dev/input: found nothing"
    plug(PermissionError(13, "denied"), spacemouse("REL"))
    assert operator.missing() == (
        "no gamepad in /dev/input: found 3Dconnexion SpaceMouse Compact; 1 that this user may not read (group input)"
    )
    plug(gamepad("another one"))
    assert operator.missing() is None
    assert not act(operator)[1]


@pytest.mark.parametrize(
    ("words", "device", "message"),
    [
        (["operator.buttons.stop=BTN_TRX"], gamepad, "operator.buttons.stop: expected the kernel's name of a button"),
        (["operator.axes.dx=ABS_YY"], gamepad, "operator.axes.dx: expected the kernel's name of an axis"),
        (["operator.axes.dx=ABS_WHEEL"], gamepad, "operator.axes.dx: 'Wireless Controller' has no ABS_WHEEL"),
        (["operator.buttons.stop=BTN_TR"], gamepad, "operator.buttons.takeover and operator.buttons.stop: expected d"),
        (["operator.deadband=1.5"], gamepad, "operator.deadband: expected a number, 0 or more and below 1, got 1.5"),
        ([], lambda: gamepad(without=["BTN_SELECT"]), "operator.buttons.stop: 'Wireless Controller' has no BTN_SELECT"),
    ],
)
def test_a_name_that_cannot_be_meant_is_one_line(env, plug, words, device, message):
    plug(device())
    with pytest.raises(Exception, match=message.replace("[", r"\[")):
        operator_of(env, "operator=gamepad", *words)


def test_a_gamepad_demonstrates_and_its_cable_is_pulled_and_plugged_in_again(env, plug, tmp_path, typist):
    """The actor, its wire and its learner; the robot holds at the pull and begins nothing until somebody is there."""
    first, second = gamepad(), gamepad()
    plug(first)

    def hands():
        typist.screen.wait_for("demo-1: set the scene, then press BTN_START")
        first.press("BTN_START")
        typist.wait_ticks(2)
        first.move("ABS_Y", -32768)
        typist.wait_ticks(3)
        plug()
        first.pull()
        typist.screen.wait_for("waiting for the operator: no gamepad in /dev/input")
        time.sleep(0.3)
        assert len(RobotPick.last.resets) == 2
        plug(second)
        typist.screen.wait_for("demo-2: set the scene")
        second.press("BTN_START")
        typist.wait_ticks(3)
        second.press("BTN_NORTH")

    with ScriptedLearner(env.spec, [ticket("demo", 1), ticket("demo", 2)]) as learner:
        code, out = typist.run(learner, tmp_path, hands, *BY_PAD)
        cut, whole = learner.episodes()
    assert code == 0, out
    assert cut.outcome.truncated_by == "stop"
    assert cut.n >= 5
    assert np.isclose(cut.arrays["action"][-1, 0], 0.0125)
    executed = np.array([action for _, action in RobotPick.last.sent])
    assert np.array_equal(np.concatenate([cut.arrays["action"], whole.arrays["action"]]), executed)
    assert RobotPick.last.holds
    assert "is gone (No such device); looking for it" in out
    assert (whole.outcome.success, whole.outcome.success_source) == (True, "human")
