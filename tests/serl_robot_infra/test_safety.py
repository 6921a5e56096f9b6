"""The safety chain: what is bent, what is refused, and in which order."""

from dataclasses import replace

import numpy as np
import pytest

from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.safety import SafetyChain, UnsafeTickError, describe
from serl_transport.contract.schema import Observation

SPEC = PickEnv(cameras=()).spec
STATE = np.float32([0, 0, 0.1, 1, -1])


def test_absolute_limits_clip():
    out = SafetyChain(SPEC).filter(np.float32([1, -1, 0.01, 9]), STATE, "policy version 1")
    assert out.dtype == np.float32
    assert np.allclose(out, [0.025, -0.025, 0.01, 1])


@pytest.mark.parametrize(("bad", "name"), [(np.nan, "nan"), (np.inf, "inf")])
def test_non_finite_actions_are_refused_naming_source_and_dim(bad, name):
    with pytest.raises(
        UnsafeTickError, match=f"policy version 7: action dim 'dy': expected a finite number, got {name}"
    ):
        SafetyChain(SPEC).filter(np.float32([0, bad, 0, 0]), STATE, "policy version 7")


def test_a_misshapen_action_is_refused():
    with pytest.raises(UnsafeTickError, match=r"operator: action: expected float32\[4\], got float32\[7\]"):
        SafetyChain(SPEC).filter(np.zeros(7, np.float32), STATE, "operator")


def test_speed_limits_are_per_second():
    chain = SafetyChain(SPEC, max_speed={"dx": 0.1})  # 10 Hz: 1 cm a tick
    assert np.allclose(chain.filter(np.float32([0.02, 0.02, 0, 1]), STATE, "x"), [0.01, 0.02, 0, 1])


def test_workspace_box_stops_at_the_wall_and_lets_out_of_trouble():
    chain = SafetyChain(SPEC, workspace={"x": {"low": -0.1, "high": 0.1, "action": "dx"}})

    def dx(x, command):
        chain.reset()
        return chain.filter(np.float32([command, 0, 0, 0]), np.float32([x, 0, 0, 0, 0]), "x")[0]

    assert dx(0.09, 0.02) == pytest.approx(0.01)
    assert dx(0.09, -0.02) == pytest.approx(-0.02)
    assert dx(0.15, 0.02) == 0.0  # outside: no further out
    assert dx(0.15, -0.02) == pytest.approx(-0.02)  # and back in no faster than commanded


def test_acceleration_is_limited_against_what_was_sent():
    chain = SafetyChain(SPEC, max_acceleration={"dx": 0.5})  # 10 Hz: 5 mm a tick more or less than the tick before

    def dx(command):
        return chain.filter(np.float32([command, 0.02, 0, 1]), STATE, "x")[0]

    assert [dx(0.02), dx(0.02), dx(0.02)] == pytest.approx([0.005, 0.010, 0.015])
    assert [dx(-0.02), dx(-0.02)] == pytest.approx([0.010, 0.005])
    chain.reset()  # it stood
    assert dx(0.02) == pytest.approx(0.005)


def test_speed_comes_before_acceleration_and_the_box_after_both():
    chain = SafetyChain(SPEC, {"dx": 0.1}, {"dx": 0.5}, workspace={"x": {"low": -0.1, "high": 0.1, "action": "dx"}})
    at_wall = np.float32([0.099, 0, 0.1, 1, -1])
    assert chain.filter(np.float32([0.02, 0, 0, 1]), STATE, "x")[0] == pytest.approx(0.005)
    assert chain.filter(np.float32([0.02, 0, 0, 1]), STATE, "x")[0] == pytest.approx(0.010)
    assert chain.filter(np.float32([0.02, 0, 0, 1]), STATE, "x")[0] == pytest.approx(0.010)  # 0.1 per second
    assert chain.filter(np.float32([0.02, 0, 0, 1]), at_wall, "x")[0] == pytest.approx(
        0.001, rel=1e-4
    )  # the wall is harder


def test_targets_are_limited_by_their_distance_from_the_last_target():
    limits = {"action_low": (-0.2, -0.2, 0.0, -1.0), "action_high": (0.2, 0.2, 0.4, 1.0)}
    spec = replace(SPEC, **limits, targets={"dx": "x"})
    chain = SafetyChain(
        spec,
        {"dx": 0.1},
        workspace={"x": {"low": -0.1, "high": 0.035, "action": "dx"}},
    )

    def target(x, command):
        return chain.filter(np.float32([command, 0, 0, 0]), np.float32([x, 0, 0, 0, 0]), "x")[0]

    assert target(0.01, 0.2) == pytest.approx(0.02)  # from where it is
    assert target(0.01, 0.2) == pytest.approx(0.03)  # from what was sent, though the robot lags behind
    assert target(0.02, 0.2) == pytest.approx(0.035)  # the box
    chain.reset()
    assert target(0.02, -0.2) == pytest.approx(0.01)


def test_a_target_that_comes_to_its_limit_at_speed_stops_there_and_one_outside_is_led_back():
    spec = replace(SPEC, action_low=(-0.2, -0.2, 0.0, -1.0), action_high=(0.2, 0.2, 0.4, 1.0), targets={"dx": "x"})
    chain = SafetyChain(spec, {"dx": 0.2}, {"dx": 0.5})  # 0.02 and 0.005 a tick

    def target(x, command):
        return chain.filter(np.float32([command, 0, 0, 0]), np.float32([x, 0, 0, 0, 0]), "x")[0]

    sent = [target(0.15, 0.2) for _ in range(6)]
    assert sent == pytest.approx([0.155, 0.165, 0.18, 0.2, 0.2, 0.2])  # 0.215, were it not for the limit
    chain.reset()
    assert target(0.25, 0.2) == pytest.approx(0.245)  # pushed out by hand


def test_observations_are_checked_naming_the_key():
    chain = SafetyChain(PickEnv(image_size=8, renderer="ray").spec)
    image = np.zeros((8, 8, 3), np.uint8)
    images = {"front": image, "wrist": image}
    chain.check_observation(Observation(images, STATE))
    bad = STATE.copy()
    bad[2] = np.nan
    with pytest.raises(UnsafeTickError, match="observation: state dim 'z': expected a finite number, got nan"):
        chain.check_observation(Observation(images, bad))
    with pytest.raises(UnsafeTickError, match="camera 'wrist': no image"):
        chain.check_observation(Observation({"front": image}, STATE))


def test_unknown_names_and_empty_boxes_are_refused():
    with pytest.raises(ValueError, match="workspace: expected one of x, y, z, opening, grip_command, got 'q'"):
        SafetyChain(SPEC, workspace={"q": {"low": 0, "high": 1, "action": "dx"}})
    with pytest.raises(ValueError, match=r"workspace\.x: low 1 must be below high 0"):
        SafetyChain(SPEC, workspace={"x": {"low": 1, "high": 0, "action": "dx"}})
    with pytest.raises(ValueError, match=r"max_acceleration\.dx: expected a number above 0, got 0"):
        SafetyChain(SPEC, max_acceleration={"dx": 0})
    with pytest.raises(ValueError, match=r"max_speed\.dx: expected a number above 0, got -1"):
        SafetyChain(SPEC, max_speed={"dx": -1})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_sped": {"dx": 1}}, "task.safety.max_sped: unknown key; did you mean 'max_speed'?"),
        ({"max_speed": {"dx": "fast"}}, "task.safety.max_speed.dx: expected a number, got 'fast'"),
        ({"max_speed": {"dx": True}}, "task.safety.max_speed.dx: expected a number, got True"),
        ({"max_speed": {"dx": float("nan")}}, "task.safety.max_speed.dx: expected a number, got nan"),
        ({"max_speed": 3}, "task.safety.max_speed: expected a mapping of names, got 3"),
        ({"max_speed": {"dq": 1}}, "task.safety.max_speed: expected one of dx, dy, dz, grip, got 'dq'"),
        ({"workspace": {"x": {"low": 0, "high": 1}}}, "task.safety.workspace.x: missing key 'action'"),
        ({"workspace": {"x": [0, 1]}}, "task.safety.workspace.x: expected {low, high, action}, got [0, 1]"),
        (
            {"workspace": {"x": {"low": 0, "hgih": 1, "action": "dx"}}},
            "workspace.x.hgih: unknown key; did you mean 'high'",
        ),
        ({"targets": {"dx": "x"}}, "task.safety.targets: say it in task.spec.targets, which the learner reads as well"),
        ([1], "task.safety: expected a mapping of names, got [1]"),
    ],
)
def test_a_mistake_in_the_yaml_names_its_key(section, message):
    with pytest.raises(ValueError) as raised:
        SafetyChain.of(SPEC, section)
    assert message in str(raised.value)


def test_the_limits_are_said_in_one_line():
    box = {"x": {"low": -0.1, "high": 0.1, "action": "dx"}}
    assert describe({"max_speed": {"dx": 0.2}, "workspace": box}, {"dy": "y"}) == (
        "safety limits: max_speed dx 0.2; workspace x -0.1 to 0.1 (by dx); targets dy follows y; nothing bounds "
        "the step of a target without max_speed, not at a hand-over: dy"
    )
    for nothing in (None, {}, {"max_speed": {}}):
        assert "task.safety is not set; targets dy follows y" in describe(nothing, {"dy": "y"})
        assert describe(nothing, {}).endswith("task.safety is not set")
