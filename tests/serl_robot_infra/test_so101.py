"""task=so101 as it stands, in the real actor, on servos and cameras that speak as real ones."""

import threading
import time

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf
from scripted_learner import Screen, ScriptedLearner, actor_config, ticket

pytest.importorskip("lerobot", reason="a robot host without LeRobot's drivers")
pytest.importorskip("scservo_sdk", reason="the lerobot extra is not installed")

from fake_camera import FakeCapture
from lerobot_rig import Rig

from flowserl_cli.compose import load_config
from serl_robot_infra import lerobot_devices
from serl_robot_infra.check.robot import Options, check
from serl_robot_infra.main import main
from serl_transport.contract.specs import TaskSpec

# A loaded machine is slow, and that is not what is tried here.
PATIENT = ["task.env.camera_max_age_ms=2000"]
STOP_MS = 5000.0


@pytest.fixture
def arms(tmp_path, monkeypatch):
    """(follower's rig, leader's rig, the task with their ports)."""
    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)
    FakeCapture.devices, FakeCapture.frozen = {0, 1}, set()
    task = load_config(["task=so101", "task.spec.max_ticks=20", "task.env.home_speed=300", *PATIENT]).task
    for index, camera in enumerate(("front", "wrist")):
        for key, value in (("index_or_path", index), ("warmup_s", 0)):
            OmegaConf.update(task, f"env.robot.cameras.{camera}.{key}", value, force_add=True)
    for node in (task.env.robot, task.operator.teleop):
        (tmp_path / node.id).mkdir()
        OmegaConf.update(node, "calibration_dir", str(tmp_path / node.id), force_add=True)
    robot, teleop = (OmegaConf.to_container(node) for node in (task.env.robot, task.operator.teleop))
    with (
        Rig(tmp_path / "follower", lerobot_devices.make_robot, robot) as arm,
        Rig(tmp_path / "leader", lerobot_devices.make_teleoperator, teleop) as lead,
    ):
        task.env.robot, task.operator.teleop = arm.node, lead.node
        yield arm, lead, task


def act(task, tmp_path, tickets, meanwhile=lambda screen: None):
    """Exit code, what the screen said, and the episodes."""
    spec = TaskSpec.from_dict(OmegaConf.to_container(task.spec, resolve=True))
    with ScriptedLearner(spec, tickets) as learner:
        config = actor_config(learner, tmp_path, demo_noise="auto", rate_hz=None)
        OmegaConf.update(config, "rollout.watchdog", {"stop_ms": STOP_MS}, force_add=True)
        config.task = task
        screen = Screen()
        thread = threading.Thread(target=meanwhile, args=(screen,), daemon=True)
        thread.start()
        code = main(config, screen)
        thread.join(10)
        return code, screen.getvalue(), learner.episodes()


def test_the_leader_demonstrates(arms, tmp_path):
    _, lead, task = arms
    lead.chains[0].servos[1].set("Present_Position", 2047 + 114)  # 10 degrees
    code, out, (episode,) = act(task, tmp_path, [ticket("demo", 1)])
    assert code == 0, out
    assert "watchdog: controlled stop after 5000 ms" in out
    assert episode.arrays["intervention"].all()
    assert episode.n == 20
    # Matched at 25 units per second at 20 Hz from home, so at most 1.25 a tick before it follows.
    pan = episode.arrays["action"][:, 0]
    assert pan[-1] == pytest.approx(10.0, abs=0.2)
    assert np.abs(np.diff(pan)).max() < 4.0
    assert episode.arrays["observation.images.front"].shape[1:] == (240, 320, 3)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    "part", ["arm", pytest.param("leader", marks=pytest.mark.slow), pytest.param("camera", marks=pytest.mark.slow)]
)
def test_a_part_that_is_unplugged_costs_one_episode_and_the_night_goes_on(arms, tmp_path, part):
    arm, lead, task = arms
    unplug, plug = {
        "arm": (arm.unplug, arm.plug),
        "leader": (lead.unplug, lead.plug),
        "camera": (lambda: FakeCapture.devices.discard(0), lambda: FakeCapture.devices.add(0)),
    }[part]

    def meanwhile(screen):
        until(lambda: len(arm.chains[0].goals) > 6 * 15)  # the drive home is over
        unplug()
        screen.wait_for("cut at tick")
        time.sleep(0.3)
        plug()

    code, out, episodes = act(task, tmp_path, [ticket("demo", seed) for seed in range(1, 5)], meanwhile)
    assert code == 0, out
    cut = [episode for episode in episodes if episode.outcome.truncated_by == "stop"]
    assert len(cut) <= 1, out
    assert [episode.n for episode in episodes if episode not in cut][-1] == 20
    assert len(episodes) >= 2
    names = {"arm": "so101_follower", "leader": "so101_leader", "camera": "OpenCVCamera(0)"}
    assert names[part] in out[out.index("cut at tick") :].splitlines()[0]


def test_check_robot_looks_at_the_arm_and_nothing_moves(arms, tmp_path):
    """Then with a frozen camera, and with limits that its calibration does not allow."""
    arm, _, task = arms
    servos = arm.chains[0].servos
    servos[1].set("Present_Position", 2047 + 114)  # 10 degrees
    cfg = load_config(["task=so101", "actor=true", "ip=null", "run=lab", f"runs_dir={tmp_path}"])
    cfg.task = task
    cfg.rollout.watchdog.stop_ms = 400.0
    report, said = checked(cfg)
    bad = [f for f in report.findings if f.level == "FAILURE" and f.check not in ("control rate", "silence")]
    assert not bad, said  # a loaded machine is slow
    assert "inside what the robot says of 6 actions" in said
    assert "stop() came back after" in said
    assert "LeRobotTeleop" in said
    assert servos[1].get("Goal_Position") == servos[1].get("Present_Position") == 2047 + 114
    FakeCapture.frozen = {0}
    cfg.task.env.camera_frozen_s = 0.2
    cfg.task.spec.action_high[0] = cfg.task.env.spec.action_high[0] = 200.0
    report, said = checked(cfg)
    assert report.exit_code == 1
    failures = {f.check: f.says for f in report.of("FAILURE")}
    assert "camera front: the same picture for 0.2 s" in failures["loop"]
    assert "shoulder_pan.pos: action_high 200 is above the robot's 180" in failures["robot's limits"]


def checked(cfg):
    screen = Screen()
    return check(cfg, Options(seconds=0.5), screen), screen.getvalue()
