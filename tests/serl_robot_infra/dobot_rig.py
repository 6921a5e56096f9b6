"""The X-Trainer on fakes: controllers on TCP, grippers and leaders at pseudo-terminals, OpenCV's cameras."""

import copy
import functools
import time
import types
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import yaml
from fake_camera import FakeCapture
from fake_dobot import HOME, FakeDobot
from fake_leader import FakeLeader
from omegaconf import OmegaConf
from servo_chain import ServoChain

from flowserl_cli.compose import load_config
from serl_robot_infra.envs.dobot.env import DobotEnv

SMS = {
    "Model_Number": (3, 2), "Min_Position_Limit": (9, 2), "Max_Position_Limit": (11, 2), "Torque_Enable": (40, 1),
    "Goal_Position": (42, 2), "Torque_Limit": (48, 2), "Present_Position": (56, 2),
}  # fmt: skip
# A loaded machine is slow, and that is not what is tried here.
FAST = (
    "spec.control_hz=50",
    "env.home_speed=1.5",
    "env.joint_speed=2.0",
    "env.camera_max_age_ms=2000",
    "env.feedback_max_age_ms=500",
)
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


class FeetechTables:
    """What `ServoChain` asks of a LeRobot bus: one gripper servo."""

    model_ctrl_table, model_number_table, model_resolution_table = {"sms": SMS}, {"sms": 10760}, {"sms": 4096}

    def __init__(self, number: int):
        self.motors = {"gripper": types.SimpleNamespace(id=number, model="sms")}


@functools.cache
def _task(name: str):
    return load_config([f"task={name}"]).task


class DobotRig:
    """Context manager; `arms` and `grippers` by side. `task`: the yaml of that name with their addresses."""

    def __init__(self, folder: Path, *words: str, name: str = "dobot_pnp", v4: bool = False, cameras: bool = False):
        self._folder, self._stack = folder, ExitStack()
        self.task = copy.deepcopy(_task(name))
        OmegaConf.set_struct(self.task, False)
        firmware = ["env.firmware=v4"] if v4 else []
        none = [] if cameras else ["spec.cameras={}", "env.cameras={}"]
        for word in (*firmware, *none, *words):
            key, _, value = word.partition("=")
            OmegaConf.update(self.task, key, yaml.safe_load(value), merge=False)
        self.task.env.home = self.task.env.home[-1:]  # where the fakes stand
        self.arms = {side: FakeDobot(HOME[side], v4) for side in ("left", "right")}
        self.grippers = {
            side: ServoChain(FeetechTables(self.task.env.arms[side].gripper.id), folder / f"gripper_{side}")
            for side in self.arms
        }
        self._cameras = cameras
        self.leaders = {
            side: FakeLeader(node, folder / f"leader_{side}")
            for side, node in getattr(self.task.operator, "arms", {}).items()
        }

    def __enter__(self) -> "DobotRig":
        if self._cameras:
            self._stack.enter_context(mock.patch.object(cv2, "VideoCapture", FakeCapture))
            FakeCapture.devices, FakeCapture.frozen = set(range(len(CAMERAS))), set()
        for side in self.arms:
            self._stack.enter_context(self.arms[side])
            self._stack.enter_context(self.grippers[side])
            node = {**self.arms[side].node, "gripper": {"port": str(self.grippers[side].port)}}
            OmegaConf.update(self.task, f"env.arms.{side}", node)
        for side, leader in self.leaders.items():
            leader.put(np.radians(HOME[side]), 1.0)
            self._stack.enter_context(leader)
            self.task.operator.arms[side].port = str(leader.port)
        for index, camera in enumerate(CAMERAS if self._cameras else ()):
            OmegaConf.update(self.task, f"env.cameras.{camera}.source", index)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def build(self) -> DobotEnv:
        """The environment as the task's yaml makes it."""
        self.task.env.spec = self.task.spec
        return DobotEnv(**{key: node for key, node in self.task.env.items() if key != "_target_"})


def adversarial(rng, spec, number):
    """float32[ad]: far outside, not finite, reversals, creeping outwards."""
    low, high = np.float32(spec.action_low), np.float32(spec.action_high)
    action = rng.uniform(low, high).astype(np.float32)
    kind = number % 6
    if kind == 0:
        action[rng.integers(len(action))] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == 1:
        action *= rng.choice([-1e3, 1e3, 1e17])
    elif kind == 2:
        action = high if number % 12 == 2 else low  # from one end to the other
    elif kind == 3:
        action[:] = rng.choice([-50.0, 50.0])
    elif kind == 4:
        action = np.where(rng.random(len(action)) < 0.5, low, high)
    return action.astype(np.float32)


def step_on(env, action):
    """For a second, or until it fails."""
    for _ in range(100):
        env.step(action)
        time.sleep(0.01)
