"""End-effector control of Dobot arms: displacements, rotations, the box; the controller solves inverse kinematics."""

import time

import numpy as np
import pytest
from dobot_rig import adversarial, step_on
from fake_dobot import HOME, as_six, forward
from omegaconf import OmegaConf

from serl_robot_infra.envs.base import PartLostError
from serl_robot_infra.envs.dobot.rotation import angles_of, matrix_of_angles, matrix_of_vector, vector_of
from serl_robot_infra.envs.dobot.targets import Box, Lead, ToolTarget
from serl_robot_infra.safety import SafetyChain, UnsafeTickError

TOOL = "dobot_pnp_tool"
TIP = np.array([0.0, 0.0, 197.0, 0.0, 0.0, 0.0])
BOXES = {"left": [(-450, 300), (-750, -160), (40, 600)], "right": [(-250, 450), (-750, -160), (40, 600)]}


@pytest.mark.parametrize("v4", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["v3", "v4"])
def test_displacements_move_the_tips(xtrainer, v4):
    env, rig = xtrainer(name=TOOL, v4=v4)
    before = env.reset(1).state
    move = np.zeros(14, np.float32)
    move[[0, 2, 9]] = 0.002, -0.002, 0.002  # left x and z, right z
    move[3], move[[6, 13]] = 0.01, 1.0  # left about x, where Rx is at ±180 degrees
    for _ in range(10):
        stepped = env.step(move)
        time.sleep(0.02)
    np.testing.assert_allclose(stepped.executed, move, atol=1e-6)
    time.sleep(0.2)
    after = env.observe().state
    names = list(env.spec.state_names)
    for name, moved in (("left_x", 0.02), ("left_z", -0.02), ("left_y", 0.0), ("right_z", 0.02), ("right_x", 0.0)):
        assert after[names.index(name)] - before[names.index(name)] == pytest.approx(moved, abs=1e-3), name
    turned = forward(rig.arms["left"].joints, TIP)[:3, :3] @ forward(np.array(HOME["left"], float), TIP)[:3, :3].T
    np.testing.assert_allclose(vector_of(turned), [0.1, 0, 0], atol=2e-3)


def test_what_the_controller_cannot_reach_is_an_alarm_and_the_next_reset_clears_it(xtrainer, caplog):
    env, _ = xtrainer("env.tool_box={}", "env.lead={position: 2.0}", "spec.action_high=" + str([2.0] * 14), name=TOOL)
    env.reset(1)
    far = np.zeros(14, np.float32)
    far[2] = 1.9
    with pytest.raises(PartLostError, match=r"left arm: the controller has alarm 17 \(no inverse kinematics\)"):
        step_on(env, far)
    env.reset(2)
    assert "left arm: alarm 17 (no inverse kinematics); clearing it" in caplog.text


@pytest.mark.parametrize("many", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "driver alone"])
def test_adversarial_displacements_command_no_pose_outside_the_box(xtrainer, chain, many):
    env, rig = xtrainer(name=TOOL)
    spec, rng, refused = env.spec, np.random.default_rng(0), 0
    safety = SafetyChain.of(spec, OmegaConf.to_container(rig.task.safety, resolve=True))
    state = env.reset(1).state
    for number in range(many):
        try:
            action = adversarial(rng, spec, number)
            action = safety.filter(action, state, "a fiend") if chain else action
            stepped = env.step(action)
        except (UnsafeTickError, ValueError):
            refused += 1
            continue
        except PartLostError:  # a singularity, told by the controller: an episode ends
            state = env.reset(number).state
            safety.reset()
            continue
        state = stepped.observation.state
        if chain:
            safety.executed(stepped.executed)
    assert refused >= many // 6
    for side, box in BOXES.items():
        poses = np.array(rig.arms[side].poses)
        assert len(poses) > many // 2
        for axis, (low, high) in enumerate(box):
            assert low - 1e-3 <= poses[:, axis].min() <= poses[:, axis].max() <= high + 1e-3
        assert rig.arms[side].fastest.max() <= 135.1


def test_rotations_agree_with_the_arms_own():
    rng = np.random.default_rng(0)
    for _ in range(50):
        joints = rng.uniform(-170, 170, 6)
        pose = forward(joints, TIP)
        np.testing.assert_allclose(matrix_of_angles(np.radians(as_six(pose)[3:])), pose[:3, :3], atol=1e-9)
        np.testing.assert_allclose(matrix_of_angles(angles_of(pose[:3, :3])), pose[:3, :3], atol=1e-9)
        vector = rng.uniform(-1.5, 1.5, 3)
        np.testing.assert_allclose(vector_of(matrix_of_vector(vector)), vector, atol=1e-9)
    for ry in (np.pi / 2, -np.pi / 2):
        upright = matrix_of_angles(np.array([0.3, ry, 0.2]))
        np.testing.assert_allclose(matrix_of_angles(angles_of(upright)), upright, atol=1e-7)


def test_a_target_stays_near_a_tip_that_does_not_follow():
    target, measured = (
        ToolTarget(Lead(position=0.05, rotation=0.2), Box({"z": [0.0, 1.0]})),
        np.array([0, 0, 0.3, 3.1, 0, 0]),
    )
    for _ in range(20):
        pose, made = target.move(np.array([0.01, 0, -0.02, 0, 0.05, 0]), measured)
    np.testing.assert_allclose(pose[:3], [0.05, 0, 0.25], atol=1e-9)
    assert np.linalg.norm(vector_of(matrix_of_angles(pose[3:]) @ matrix_of_angles(measured[3:]).T)) <= 0.2 + 1e-9
    np.testing.assert_allclose(made, 0, atol=1e-9)  # nothing more became of the wish
    below = np.array([0, 0, -0.02, 3.1, 0, 0])  # a person pushed it out of the box: it may come back, not go on
    target.forget()
    assert target.move(np.array([0, 0, -0.01, 0, 0, 0]), below)[0][2] == pytest.approx(-0.02)
    assert target.move(np.array([0, 0, 0.01, 0, 0, 0]), below)[0][2] == pytest.approx(-0.01)
