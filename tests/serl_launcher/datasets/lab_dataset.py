"""A LeRobot dataset as a lab records it: an arm with absolute joint targets, two cameras, names of its own."""

from pathlib import Path

import numpy as np

JOINTS = ["pan", "lift", "elbow", "flex", "roll", "gripper"]


def lab_dataset(
    folder: Path, *, shape=(24, 32, 3), lengths=(12, 12), tasks=("put it into the cup",), video=False, fps=30
) -> Path:
    """Written by LeRobot. The pictures of tick t have the brightness 9 t; each action is the pose of the next tick."""
    from lerobot.datasets import LeRobotDataset

    first = shape[0] == 3
    names = ["channels", "height", "width"] if first else ["height", "width", "channels"]
    image = {"dtype": "video" if video else "image", "shape": shape, "names": names}
    h, w = shape[1:] if first else shape[:2]
    features = {f"observation.images.{camera}": image for camera in ("front", "wrist")}
    features |= {
        key: {"dtype": "float32", "shape": (6,), "names": {"motors": JOINTS}} for key in ("observation.state", "action")
    }
    dataset = LeRobotDataset.create("local/lab", fps=fps, features=features, root=folder, use_videos=video)
    for episode, length in enumerate(lengths):
        for tick in range(length):
            pose, target = ((30 * np.sin((tick + k) / 9 + np.arange(6) + episode)).astype(np.float32) for k in (0, 1))
            frame = {"observation.state": pose, "action": target, "task": tasks[episode % len(tasks)]}
            picture = np.full((h, w, 3), 9 * tick, np.uint8)
            dataset.add_frame(frame | {f"observation.images.{camera}": picture for camera in ("front", "wrist")})
        dataset.save_episode()
    dataset.finalize()
    return folder
