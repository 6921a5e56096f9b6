"""A LeRobot dataset small enough for tests: two cameras, three episodes whose actions follow from what is seen."""

import json
from pathlib import Path

import numpy as np

SIDE, TICKS, EPISODES = 32, 20, 3


def make_dataset(folder: Path, episodes: int = EPISODES, habit: float = 0.0) -> Path:
    """Written by LeRobot itself. The brightness of `front` and the state determine the action.

    habit: size of an offset of each episode's second action, which nothing that is seen tells of a new episode.
    """
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.front": image,
        "observation.images.wrist": image,
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "g"]},
    }
    dataset = LeRobotDataset.create("local/sft", fps=10, features=features, root=folder, use_videos=False)
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        offset = habit * rng.standard_normal()
        for tick in range(TICKS):
            phase = tick / TICKS
            frame = np.full((SIDE, SIDE, 3), (40 + 60 * episode) % 256, np.uint8)
            frame[: SIDE // 2] = int(200 * phase)
            dataset.add_frame(
                {
                    "observation.images.front": frame,
                    "observation.images.wrist": rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8),
                    "observation.state": np.array([phase, episode / 2, np.sin(3 * phase)], np.float32),
                    "action": np.array([0.05 * np.cos(4 * phase) + 0.02 * episode, 3 * phase - 1 + offset], np.float32),
                    "task": "pick up the red cube",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return folder


def add_modality(folder: Path) -> None:
    """GR00T's description of the same data, in parts, the state in another order."""
    content = {
        "state": {"tail": {"start": 1, "end": 3}, "head": {"start": 0, "end": 1}},
        "action": {"arm": {"start": 0, "end": 1}, "gripper": {"start": 1, "end": 2}},
        "video": {"ego": {"original_key": "observation.images.front"}},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }
    (folder / "meta" / "modality.json").write_text(json.dumps(content))
