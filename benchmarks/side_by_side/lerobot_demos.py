"""The demonstrations as the LeRobotDataset that LeRobot's learner fills its offline buffer from."""

from pathlib import Path

import numpy as np
from lockstep import seed_of
from side_by_side.lerobot_config import DATASET
from side_by_side.lerobot_env import GRIPPER_PENALTY, ActionUnits
from side_by_side.side_task import Robot, Settings


def record(robot: Robot, settings: Settings, folder: Path) -> int:
    """Until `settings.demos` succeeded; only these are kept. Returns the ticks it took, of failed ones too."""
    from lerobot.datasets import LeRobotDataset

    spec = robot.env.spec
    dataset = LeRobotDataset.create(
        DATASET, fps=int(spec.control_hz), root=folder, features=_features(spec), use_videos=False
    )
    units = ActionUnits(np.asarray(spec.action_high[:3]))
    kept = number = ticks = 0
    while kept < settings.demos:
        number += 1
        observation, over, closed = robot.begin(seed_of(settings.seed, "demo", number), "demo"), False, False
        tick = 0
        while not over:
            action, _ = robot.operator.act(observation, _nobody, tick)
            result = robot.env.step(action)
            over = result.terminated or result.truncated
            moved, closed = (action[3] > 0) != closed, bool(action[3] > 0)
            dataset.add_frame(
                {
                    **{f"observation.images.{name}": image for name, image in observation.images.items()},
                    "observation.state": observation.state,
                    "action": units.to_theirs(action),
                    "next.reward": np.float32([result.reward]),
                    "next.done": np.array([result.terminated]),
                    "complementary_info.discrete_penalty": np.float32([GRIPPER_PENALTY if moved else 0.0]),
                    "task": spec.prompt,
                }
            )
            observation, tick = result.observation, tick + 1
        ticks += tick
        if result.success:
            dataset.save_episode()
            kept += 1
        else:
            dataset.clear_episode_buffer()
    dataset.finalize()
    return ticks


def _nobody() -> np.ndarray:
    raise RuntimeError("a demonstration asked the policy")


def _features(spec) -> dict:
    images = {
        f"observation.images.{name}": {"dtype": "image", "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for name, size in spec.cameras.items()
    }
    return {
        **images,
        "observation.state": {"dtype": "float32", "shape": (len(spec.state_names),), "names": list(spec.state_names)},
        "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper"]},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "complementary_info.discrete_penalty": {"dtype": "float32", "shape": (1,), "names": ["discrete_penalty"]},
    }
