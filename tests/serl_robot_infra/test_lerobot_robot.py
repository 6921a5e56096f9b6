"""LeRobot's robots behind our interface: its own drivers and SDKs, on servos and cameras that speak as real ones."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="a robot host without LeRobot's drivers")
pytest.importorskip("scservo_sdk", reason="the lerobot extra is not installed")

import cv2
from fake_camera import FakeCapture
from lerobot_rig import Rig, cameras

from serl_robot_infra import lerobot_devices
from serl_robot_infra.envs.base import Environment, PartLostError
from serl_robot_infra.envs.camera import FrozenCheck
from serl_robot_infra.envs.lerobot_robot import LeRobotEnv
from serl_robot_infra.guard import Stoppable

DEGREES = {"use_degrees": True}
# type -> (its yaml beside id and port, arms): every robot that LeRobot 0.6.1 drives over a serial line of servos.
ROBOTS = {
    "so100_follower": (DEGREES, 1),
    "so101_follower": (DEGREES | {"max_relative_target": 5.0}, 1),
    "koch_follower": (DEGREES, 1),
    "omx_follower": (DEGREES, 1),
    "hope_jr_arm": ({}, 1),
    "hope_jr_hand": ({"side": "left"}, 1),
    "lekiwi": (DEGREES | {"cameras": {}}, 1),
    "bi_so_follower": ({"left_arm_config": DEGREES, "right_arm_config": DEGREES}, 2),
}


@pytest.fixture(autouse=True)
def _cameras(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)


def spec_of(robot, **changes):
    """The task that names everything the robot has."""
    seen, actions = robot.observation_features, lerobot_devices.feature_names(robot.action_features)
    states = [name for name, kind in seen.items() if not isinstance(kind, tuple)]
    return {
        "name": "arm", "prompt": "move", "state_names": states, "action_names": actions,
        "cameras": {name: list(kind[:2]) for name, kind in seen.items() if isinstance(kind, tuple)},
        "state_low": [-1e3] * len(states), "state_high": [1e3] * len(states),
        "action_low": [-1e3] * len(actions), "action_high": [1e3] * len(actions), "control_hz": 50.0, "max_ticks": 100,
    } | changes  # fmt: skip


def still_of(robot):
    return {name: 0.0 for name in robot.action_features if not name.endswith(".pos")}


@pytest.fixture(params=list(ROBOTS))
def rig(request, tmp_path):
    more, arms = ROBOTS[request.param]
    with Rig(tmp_path, lerobot_devices.make_robot, {"type": request.param, **more}, arms) as rig:
        yield rig


def build(rig, **options):
    robot = lerobot_devices.make_robot(rig.node)
    return LeRobotEnv(spec_of(robot), rig.node, still=still_of(robot), **options)


def joints(env):
    return [i for i, name in enumerate(env.spec.action_names) if name.endswith(".pos")]


def test_contract(rig):
    env = build(rig)
    assert isinstance(env, Environment)
    assert isinstance(env, Stoppable)
    seen = env.reset(0)
    env.spec.check_observation(seen)
    at = dict(zip(env.spec.state_names, seen.state, strict=True))
    wish = np.array([at[name] if name.endswith(".pos") else 0.0 for name in env.spec.action_names], np.float32)
    wish[joints(env)] += 3.0
    for _ in range(10):
        result = env.step(wish)
        env.spec.check_observation(result.observation)
        env.spec.check_action(result.executed)
        time.sleep(0.02)
    assert np.abs(result.executed - wish).max() < 0.5  # a servo's own resolution
    there = dict(zip(env.spec.state_names, result.observation.state, strict=True))
    assert all(
        there[name] == pytest.approx(at[name] + 3.0, abs=0.5) for name in np.array(env.spec.action_names)[joints(env)]
    )

    env.hold()
    env.reset(1)
    env.stop()
    assert np.abs(env.step(wish + 50.0).executed - wish)[joints(env)].max() < 0.5  # ignored until the reset
    env.reset(2)
    env.close()
    env.close()


def test_an_unplugged_robot_is_told_and_opened_anew(rig):
    env = build(rig)
    seen = env.reset(0)
    at = dict(zip(env.spec.state_names, seen.state, strict=True))
    wish = np.array([at[name] if name.endswith(".pos") else 0.0 for name in env.spec.action_names], np.float32)
    rig.unplug()
    with pytest.raises(PartLostError, match=f"{rig.node['type']}.step"):
        env.step(wish)
    with pytest.raises(lerobot_devices.FAULTS):
        env.hold()
    with pytest.raises(lerobot_devices.FAULTS):
        env.stop()
    with pytest.raises(PartLostError, match="reset"):
        env.reset(1)
    rig.plug()
    before = [len(chain.goals) for chain in rig.chains]
    env.stop()  # the guard tries until it is taken
    env.reset(1)  # asks for the pose: what was written before has arrived
    assert all(len(chain.goals) > n for chain, n in zip(rig.chains, before, strict=True))
    env.spec.check_observation(env.step(wish).observation)
    env.close()


def test_a_hold_keeps_one_pose_while_the_arm_sags(so101):
    arm = so101()
    arm.env.reset(0)
    arm.env.hold()
    kept = arm.chain.goals_soon()[-6:]
    for servo in arm.chain.servos.values():
        servo.set("Present_Position", servo.get("Present_Position") - 20)
    arm.env.hold()
    assert arm.chain.goals_soon()[-6:] == kept


def go_on(env, action, ticks=100):
    for _ in range(ticks):
        env.step(action)
        time.sleep(0.02)


class So101:
    """The one that the rest is tried with."""

    def __init__(self, tmp_path, robot=None, **options):
        robot = {"type": "so101_follower", "cameras": cameras("front", "wrist"), **DEGREES, **(robot or {})}
        self.rig = Rig(tmp_path, lerobot_devices.make_robot, robot).__enter__()
        made = lerobot_devices.make_robot(self.rig.node)
        self.spec = spec_of(made, **options.pop("spec", {}))
        self.env = LeRobotEnv(self.spec, self.rig.node, **options)
        self.chain = self.rig.chains[0]


@pytest.fixture
def so101(tmp_path):
    made = []

    def make(**options):
        made.append(So101(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.env.close()
        one.rig.__exit__()


def test_its_torque_comes_on_without_a_jump_and_stays_on_when_the_line_is_opened_anew(so101):
    arm = so101(robot={"disable_torque_on_disconnect": False})
    servo = arm.chain.servos[1]
    assert servo.get("Torque_Enable") == 1
    assert servo.get("Goal_Position") == servo.get("Present_Position")
    arm.env.reset(0)
    arm.rig.unplug()
    with pytest.raises(PartLostError):
        arm.env.step(np.zeros(6, np.float32))
    servo.set("Present_Position", 2500)  # somebody moved it meanwhile
    servo.set("Goal_Position", 2500)
    arm.rig.plug()
    torque = []
    memory = arm.chain.servos[1].memory

    class Watched(bytearray):
        def __setitem__(self, where, value):
            super().__setitem__(where, value)
            torque.append(servo.get("Torque_Enable"))

    servo.memory = Watched(memory)
    arm.env.reset(0)
    assert set(torque) == {1}
    assert abs(servo.get("Goal_Position") - 2500) < 50


def test_servos_that_lost_their_supply_are_set_up_again(so101):
    arm = so101()
    arm.env.reset(0)
    arm.rig.unplug()
    with pytest.raises(PartLostError):
        arm.env.step(np.zeros(6, np.float32))
    for servo in arm.chain.servos.values():
        servo.set("Torque_Enable", 0)
        servo.set("P_Coefficient", 99)
    arm.rig.plug()
    arm.env.reset(0)
    assert {servo.get("Torque_Enable") for servo in arm.chain.servos.values()} == {1}
    assert {servo.get("P_Coefficient") for servo in arm.chain.servos.values()} == {16}


def test_a_corrupted_packet_is_asked_for_again_and_nobody_notices(so101):
    arm = so101()
    arm.env.reset(0)
    arm.chain.corrupt = 1
    arm.env.step(np.zeros(6, np.float32))
    assert arm.chain.corrupt == 0


def test_the_drivers_own_clipping_is_what_was_executed(so101, caplog):
    arm = so101(robot={"max_relative_target": 2.0})
    arm.env.reset(0)
    for _ in range(2):
        executed = arm.env.step(np.full(6, 60.0, np.float32)).executed
    assert (executed < 10).sum() == 5
    assert len([line for line in caplog.messages if "the driver bends actions" in line]) == 1
    assert not [line for line in caplog.messages if "had to be clamped" in line]


def test_reset_drives_home_at_its_speed_and_a_stop_ends_the_drive(so101):
    home = {"shoulder_pan.pos": 20.0}
    arm = so101(home=home, home_speed=40.0)
    start = time.monotonic()
    at = arm.env.reset(0).state[0]
    assert (at, time.monotonic() - start) == (pytest.approx(20.0, abs=1.0), pytest.approx(1.0, abs=0.6))
    go_on(arm.env, np.zeros(6, np.float32), ticks=15)
    threading.Timer(0.1, arm.env.stop).start()
    assert arm.env.reset(1).state[0] < 15.0


def test_a_stop_is_obeyed_while_a_step_keeps_the_bus(so101):
    arm = so101()
    arm.env.reset(0)
    with arm.env._lock:  # a transaction that hangs
        seen = []

        def stop():
            with pytest.raises(TimeoutError, match="its bus is busy"):
                arm.env.stop()
            seen.append(time.monotonic())

        thread, start = threading.Thread(target=stop), time.monotonic()
        thread.start()
        thread.join()
    assert seen[0] - start < 1.0
    goals = len(arm.chain.goals)
    arm.env.step(np.full(6, 30.0, np.float32))  # what was decided before is not sent any more
    assert len(arm.chain.goals_soon()) == goals


def test_torque_is_taken_away_after_a_stop_where_the_yaml_says_so(so101):
    arm = so101(release_on_stop=True)
    arm.env.reset(0)
    arm.env.stop()
    assert {servo.get("Torque_Enable") for servo in arm.chain.servos.values()} == {0}
    arm.env.reset(0)
    assert {servo.get("Torque_Enable") for servo in arm.chain.servos.values()} == {1}


def test_an_unplugged_camera_is_told_the_arm_holds_and_the_camera_comes_back(so101):
    arm = so101(camera_max_age_ms=600)
    wish = np.zeros(6, np.float32)
    arm.env.reset(0)
    arm.env.step(wish)
    FakeCapture.devices.discard(1)
    with pytest.raises(PartLostError, match=r"OpenCVCamera\(1\)"):
        go_on(arm.env, wish)
    goals = len(arm.chain.goals)
    arm.env.hold()
    assert len(arm.chain.goals_soon()) == goals + 6
    with pytest.raises(PartLostError):
        arm.env.reset(1)
    FakeCapture.devices.add(1)
    arm.env.spec.check_observation(arm.env.reset(1))
    arm.env.spec.check_observation(arm.env.step(wish).observation)


def test_a_frozen_picture_is_a_lost_camera(so101):
    arm = so101(camera_frozen_s=0.2)
    arm.env.reset(0)
    FakeCapture.frozen.add(0)
    start = time.monotonic()
    with pytest.raises(PartLostError, match="camera front: the same picture for"):
        go_on(arm.env, np.zeros(6, np.float32))
    assert time.monotonic() - start < 4.0
    FakeCapture.frozen.clear()
    before = arm.env._robot.cameras["front"].videocapture
    arm.env.reset(1)
    assert arm.env._robot.cameras["front"].videocapture is not before


def test_a_picture_that_never_changes_may_be_allowed():
    picture = np.zeros((4, 4, 3), np.uint8)
    never, at_once = FrozenCheck(None), FrozenCheck(0.0)
    assert [check.is_frozen(picture) for check in (never, at_once) * 2] == [False, False, False, True]


def test_pictures_are_scaled_down_to_the_tasks_size(so101):
    arm = so101(spec={"cameras": {"front": [24, 32]}})
    image = arm.env.reset(0).images["front"]
    assert (image.shape, image.dtype) == ((24, 32, 3), np.uint8)


def refused(tmp_path, error=ValueError, spec=None, **changes):
    options = {key: changes.pop(key) for key in ("home", "still", "home_speed") if key in changes}
    node = {"type": "so101_follower", "cameras": cameras("front"), **DEGREES}
    with Rig(tmp_path, lerobot_devices.make_robot, node) as rig:
        good = spec_of(lerobot_devices.make_robot(rig.node))
        with pytest.raises(error) as caught:
            LeRobotEnv(good | (spec or {}), rig.node | changes, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "so101_folower"}, "robot.type: LeRobot has no 'so101_folower'; did you mean 'so101_follower'"),
        ({"prot": "/dev/x"}, "task.env.robot.prot: SOFollowerRobotConfig has no such key; did you mean 'port'"),
        ({"cameras": {"front": {"type": "opencv", "fsp": 3}}}, "cameras.front.fsp: OpenCVCameraConfig has no such key"),
        ({"cameras": {"front": {"type": "opnecv"}}}, "front.type: LeRobot has no 'opnecv'; did you mean 'opencv'"),
        ({"max_relative_target": "far"}, "task.env.robot"),
        ({"home": {"shoulder.pos": 0.0}}, "task.env.home: so_follower has no 'shoulder.pos'; did you mean"),
        ({"home_speed": 0}, "task.env.home_speed: expected a number above 0, got 0"),
        ({"spec": {"cameras": {"frnt": [48, 64]}}}, "spec.cameras: so_follower has no 'frnt'; did you mean 'front'"),
        ({"spec": {"cameras": {"front": [48, 48]}}}, "cameras.front: expected [48, 64] as the camera takes it"),
        ({"id": "new"}, "robot so101_follower: its calibration is not at"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, changes, message):
    assert message in refused(tmp_path, **changes)


def test_the_unit_must_be_said(tmp_path):
    with pytest.raises(ValueError, match=r"task\.env\.robot\.use_degrees: say true"):
        lerobot_devices.make_robot({"type": "so101_follower", "port": str(tmp_path)})


def test_a_missing_calibration_names_lerobots_own_command_and_asks_nothing(tmp_path):
    said = refused(tmp_path, id="new")
    assert f"lerobot-calibrate --robot.id=new --robot.calibration_dir={tmp_path} --robot.type=so101_follower" in said
    assert f"--robot.port={tmp_path / 'arm'}" in said


def test_a_port_where_nothing_is_is_one_line(tmp_path):
    assert "Could not connect on port" in refused(tmp_path, OSError, port=str(tmp_path / "nothing"))


def test_its_unit_is_that_of_its_servos(so101):
    assert so101().env.uses_degrees is True
    assert so101(robot={"use_degrees": False}).env.uses_degrees is False


def test_a_robot_is_not_disturbed(so101):
    with pytest.raises(ValueError, match=r"rollout\.demo_noise"):
        so101().env.reset(0, actuator_noise=0.1)


def test_a_packet_that_is_lost_while_it_is_opened_does_not_end_the_start(tmp_path, caplog):
    with Rig(tmp_path, lerobot_devices.make_robot, {"type": "so101_follower", **DEGREES}) as rig:
        robot = lerobot_devices.make_robot(rig.node)
        rig.chains[0].corrupt = 1
        env = LeRobotEnv(spec_of(robot), rig.node)
        env.reset(0)
        assert "robot so101_follower: trying again: ConnectionError" in caplog.text
        env.close()
