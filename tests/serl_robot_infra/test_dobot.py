"""Dobot arms: the environment on controllers, grippers and cameras that speak as real ones (fake_dobot.py)."""

import threading
import time

import numpy as np
import pytest
from dobot_rig import CAMERAS, DobotRig, adversarial, step_on
from fake_camera import FakeCapture
from fake_dobot import HOME
from omegaconf import OmegaConf

from serl_robot_infra.envs.base import Environment, PartLostError
from serl_robot_infra.guard import Stoppable
from serl_robot_infra.safety import SafetyChain, UnsafeTickError
from serl_robot_infra.watchdog import WatchdogProcess

LEFT, RIGHT = slice(0, 6), slice(7, 13)
AWRY = np.array([0.0, 0, -90, 0, 90, 90])


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("v4", [False, True], ids=["v3", "v4"])
def test_it_answers_as_an_environment_and_as_a_robot(xtrainer, v4):
    env, rig = xtrainer(v4=v4, cameras=not v4)
    left = rig.arms["left"]
    assert isinstance(env, Environment)
    assert isinstance(env, Stoppable)
    assert env.limits()["right_joint3"] == (-2.79, 2.79)
    seen = env.reset(1)
    env.spec.check_observation(seen)
    np.testing.assert_allclose(seen.state[LEFT], np.radians(HOME["left"]), atol=0.01)
    assert {name: image.shape for name, image in seen.images.items()} == dict.fromkeys(
        () if v4 else CAMERAS, (240, 320, 3)
    )
    action = seen.state.copy()
    action[[1, 6, 8]] += [0.05, -0.4, -0.04]
    for _ in range(20):
        stepped = env.step(action)
        time.sleep(0.01)
    np.testing.assert_allclose(stepped.executed, action, atol=1e-5)
    np.testing.assert_allclose(stepped.observation.state[[1, 8]], action[[1, 8]], atol=0.01)
    assert stepped.observation.state[6] == pytest.approx(action[6], abs=0.1)
    assert env.observe().state.shape == (14,)

    env.hold()
    env.hold()
    np.testing.assert_allclose(np.radians(left.goals[-1]), action[LEFT], atol=0.02)
    env.stop()
    told = len(left.goals)
    assert left.said("Stop" if v4 else "ResetRobot")
    np.testing.assert_allclose(env.step(action + 0.1).executed[LEFT], action[LEFT], atol=0.02)
    env.hold()
    assert len(left.goals) == told  # actions are ignored until the reset
    np.testing.assert_allclose(env.reset(2).state[LEFT], np.radians(HOME["left"]), atol=0.03)
    with pytest.raises(ValueError, match=r"expected 0, got 0\.1"):
        env.reset(3, actuator_noise=0.1)
    env.close()
    env.close()


def test_an_alarm_cuts_the_episode_and_is_told_and_cleared_by_the_next_reset(xtrainer, caplog):
    env, rig = xtrainer()
    action = env.reset(1).state
    env.step(action)
    rig.arms["left"].alarm(117)
    until(lambda: env._parts[0].arm.feedback().alarmed)
    told = len(rig.arms["right"].goals)
    with pytest.raises(PartLostError, match=r"left arm: the controller has alarm 117 \(collision\)"):
        env.step(action + 0.1)
    assert len(rig.arms["right"].goals) == told  # one arm alone does not go on
    env.reset(2)
    assert "left arm: alarm 117 (collision); clearing it" in caplog.text
    assert "left arm: enabling" in caplog.text
    env.step(action)

    rig.arms["right"].estop = True
    rig.arms["right"].alarm(116)
    until(lambda: env._parts[1].arm.feedback().alarmed)
    with pytest.raises(
        PartLostError, match=r"right arm: cannot be cleared: alarm 116 \(emergency stop\).*still pressed"
    ):
        env.reset(3)
    rig.arms["right"].estop = False
    env.reset(4)


def test_an_arm_without_power_is_told_the_other_stops_and_it_is_opened_anew(xtrainer, caplog):
    env, rig = xtrainer()
    action = env.reset(1).state
    rig.arms["left"].unplug()
    with pytest.raises(PartLostError, match=r"left arm: 127\.0\.0\.1"):
        step_on(env, action)
    with pytest.raises(ConnectionError, match=r"^left arm"):
        env.stop()
    assert rig.arms["right"].said("ResetRobot")
    with pytest.raises(PartLostError, match="left arm"):
        env.reset(2)
    rig.arms["left"].plug()
    env.reset(3)
    env.step(action)
    assert "left arm: opened anew" in caplog.text
    assert rig.arms["left"].said("SetTool")[-1] > rig.arms["left"].said("ServoJ")[0]


def test_a_cable_that_is_out_is_noticed_by_the_age_of_the_feedback_and_keeps_no_stop_waiting(xtrainer):
    env, rig = xtrainer("env.feedback_max_age_ms=100")
    action = env.reset(1).state
    rig.arms["left"].silent = True
    time.sleep(0.15)
    with pytest.raises(PartLostError, match=r"left arm: .*the newest feedback is 1\d\d ms old"):
        env.step(action)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="left arm"):
        env.stop()
    assert rig.arms["right"].said("ResetRobot")[-1] - began < 0.1
    rig.arms["left"].silent = False


def test_a_stop_is_obeyed_while_a_slow_answer_keeps_the_dashboard(xtrainer):
    env, rig = xtrainer(v4=True)
    action, left = env.reset(1).state, rig.arms["left"]
    left.slow_s = 0.4  # longer than the guard waits for its turn
    step = threading.Thread(target=env.step, args=(action,))
    step.start()
    time.sleep(0.1)
    with pytest.raises(ConnectionError, match=r"left arm: .*another command has not been answered for 0\.2 s"):
        env.stop()
    assert rig.arms["right"].said("Stop")
    step.join()
    left.slow_s, told = 0.0, len(left.goals)
    env.stop()
    env.step(action)
    assert left.said("Stop")
    assert len(left.goals) == told


def test_a_stop_ends_the_drive_home_and_the_reset_says_so(xtrainer):
    env, rig = xtrainer("env.home_speed=0.2")
    env._home.append({side: np.radians(HOME[side]) + 0.5 for side in HOME})
    stopping = threading.Timer(0.4, env.stop)
    stopping.start()
    with pytest.raises(PartLostError, match="a stop ended the reset"):
        env.reset(1)
    left = rig.arms["left"]
    assert np.radians(left.joints[0]) - np.radians(HOME["left"][0]) < 0.2
    assert left.fastest.max() < np.degrees(0.2) * 1.6  # a late command makes a step of more than one period


def test_an_arm_that_does_not_follow_is_not_driven_on(xtrainer):
    env, rig = xtrainer()
    env._home.append({side: np.radians(HOME[side]) + 1.0 for side in HOME})
    rig.arms["right"].blocked = True
    with pytest.raises(PartLostError, match="right_joint1 does not follow the drive home: is the arm blocked"):
        env.reset(1)
    assert np.abs(rig.arms["right"].goals[-1] - HOME["right"]).max() < np.degrees(0.35 + 0.05)


@pytest.mark.parametrize("kind", ["unplugged", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_camera_without_new_pictures_is_told_and_opened_anew(xtrainer, kind):
    env, _ = xtrainer("env.camera_max_age_ms=300", "env.camera_frozen_s=0.3", cameras=True)
    action = env.reset(1).state
    FakeCapture.devices.discard(1) if kind == "unplugged" else FakeCapture.frozen.add(1)
    with pytest.raises(PartLostError, match="camera cam_left_wrist"):
        step_on(env, action)
    FakeCapture.devices.add(1), FakeCapture.frozen.clear()
    env.reset(2)
    env.step(action)


def test_a_gripper_that_lost_a_packet_its_supply_or_its_cable(xtrainer):
    env, rig = xtrainer()
    action = env.reset(1).state
    rig.grippers["left"].corrupt = 1
    env.step(action)
    assert rig.grippers["left"].servos[21].get("Torque_Limit") == 300
    servo = rig.grippers["left"].servos[21]
    servo.set("Torque_Limit", 1000), servo.set("Torque_Enable", 0)  # its supply was away
    env.reset(2)
    assert (servo.get("Torque_Limit"), servo.get("Torque_Enable")) == (300, 1)
    rig.grippers["left"].unplug()
    with pytest.raises(PartLostError, match=r"left arm: .*gripper_left"):
        env.step(action)
    rig.grippers["left"].plug()
    env.reset(2)


def at(key, value):
    """A change of the yaml."""
    return lambda task, left: OmegaConf.update(task, key, value, merge=False)


def standing(**values):
    """A change of the left arm."""
    return lambda task, left: left.__dict__.update(values)


def refused_change(task, left):
    task.spec.action_low[2] = -3.0


def refused_name(task, left):
    task.spec.state_names[1] = "left_joint7"
    del task.spec.targets["left_joint2"]


REFUSED = {
    "left.model: expected nova5, the controller at .* says it is nova2": at("env.arms.left.model", "nova5"),
    "left_joint3: a nova2 reaches -2.79 to 2.79 rad, got -3": refused_change,
    "the arms have no 'left_joint7'; did you mean": refused_name,
    "control_hz: expected at most 50, got 60": at("spec.control_hz", 60),
    "task.env.firmware: expected v3 or v4, got 'v5'": at("env.firmware", "v5"),
    "task.env.lead: .*joint": at("env.lead", {"joint": 1}),
    "task.env.lead: position: expected a number above 0, got -1": at("env.lead", {"position": -1}),
    "task.env.arms.left: gripper.id: expected .* from 0 to 253, got 300": at("env.arms.left.gripper.id", 300),
    r"env.home\[0\]: expected joints of left, right": at("env.home", [{"left": [0, 0]}]),
    r"task.env.home\[0\].left: left_joint1 is at 0.000 rad, outside of": at(
        "env.home", [{"left": [0] * 6, "right": [0] * 6}]
    ),
    "task.env.home_gripper: expected a number from 0 to 1, got 2": at("env.home_gripper", 2),
    "task.env.feedback_max_age_ms: expected a number above 0, got 0": at("env.feedback_max_age_ms", 0),
    "task.spec.cameras.cam_high: expected": at("env.cameras.cam_high.width", 320),
    "task.env.tool_box.lef: no such arm; did you mean 'left'": at("env.tool_box", {"lef": {}}),
    "left_joint1 is at 0.000 rad, outside of .*by hand": standing(joints=AWRY, planned=AWRY),
    "left arm: the controller says 'Control Mode Is Not Tcp'; set it to TCP/IP mode": standing(tcp_mode=False),
    "left arm: it is dragged by hand: end that first": standing(dragged=True, enabled=True),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, told):
    with DobotRig(tmp_path, cameras="cam_high" in told) as rig:
        REFUSED[told](rig.task, rig.arms["left"])
        with pytest.raises((ValueError, OSError), match=told) as refusal:
            rig.build()
        assert "\n" not in str(refusal.value)
        assert not rig.arms["left"].goals


def test_a_v4_dashboard_takes_one_client_and_the_second_is_told(xtrainer):
    _, rig = xtrainer(v4=True)
    with pytest.raises(
        ConnectionError, match="left arm: the controller says 'Connection refused, IP:Port has been occ"
    ):
        rig.build()


@pytest.mark.parametrize("v4", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["v3", "v4"])
def test_the_watchdog_process_stops_both_arms_when_the_actor_is_gone(xtrainer, tmp_path, v4, capfd):
    env, rig = xtrainer(v4=v4)
    env.reset(1)
    process = WatchdogProcess(env.stopper, tmp_path / "estop", 0.05, 0.2)
    try:
        process.begin()
        process.feed()
        if v4:  # its dashboard is the actor's until that one is gone
            assert "no second dashboard connection" in capfd.readouterr().err
            for part in env._parts:
                part.close()
        command = "Stop" if v4 else "ResetRobot"
        until(lambda: all(arm.said(command) for arm in rig.arms.values()))
        until(lambda: process.forbids() is not None)
    finally:
        process.close()


MANY = [60, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "driver alone"])
def test_adversarial_joint_actions_reach_no_motor_outside_the_limits(xtrainer, chain, many):
    env, rig = xtrainer("env.joint_speed=0.8")
    spec, rng, refused = env.spec, np.random.default_rng(0), 0
    safety = SafetyChain.of(spec, OmegaConf.to_container(rig.task.safety, resolve=True))
    state = env.reset(1).state
    before = {side: len(arm.goals) for side, arm in rig.arms.items()}
    for number in range(many):
        try:
            action = adversarial(rng, spec, number)
            action = safety.filter(action, state, "a fiend") if chain else action
            stepped = env.step(action)
        except (UnsafeTickError, ValueError):
            refused += 1
            continue
        state = stepped.observation.state
        if chain:
            safety.executed(stepped.executed)
    assert refused >= many // 6
    for side, rows in (("left", LEFT), ("right", RIGHT)):
        goals = np.radians(rig.arms[side].goals[before[side] :])
        assert len(goals) == many - refused
        assert (goals >= np.float32(spec.action_low)[rows] - 1e-4).all()
        assert (goals <= np.float32(spec.action_high)[rows] + 1e-4).all()
        assert not rig.arms[side].alarms
        if chain:  # no step above max_speed
            most = np.array([rig.task.safety.max_speed[name] for name in spec.action_names[rows]]) / spec.control_hz
            assert (np.abs(np.diff(goals, axis=0)).max(0) <= most + 1e-4).all()
        assert np.radians(rig.arms[side].fastest).max() <= 0.8 * 1.5  # joint_speed, by feedback that is some ms old
