"""Datasets in the shapes that labs publish, written by LeRobot itself, and LeRobot's own reading of their rows.

so101       two cameras of 480 × 640 as video, joints in degrees, GR00T's meta/modality.json
aloha       fourteen joints, three cameras whose features are [3, h, w]
droid       no whole vectors: parts of seven dims and of one, joined by modality.json; three cameras, video
libero      an arm's displacements in shares of the largest one; a name given twice, so that dims go by their order
two_tasks   another instruction in every second episode
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _seeded_sets import smooth

from serl_launcher.datasets.pictures import video_backend
from serl_launcher.replay.views import ChunkBatch
from serl_transport.contract.specs import TaskSpec

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
ARMS = [f"{side}_{name}" for side in ("left", "right") for name in ("waist", *JOINTS)]
Parts = dict[str, list[str]]  # column -> a name for each dim


@dataclass(frozen=True)
class Shape:
    """What LeRobot is told of a dataset, and what the tools must make of it."""

    name: str
    fps: int
    cameras: dict[str, str]  # the camera's name here -> column
    size: tuple[int, int]  # h, w
    state: Parts
    action: Parts
    video: bool = False
    channels_first: bool = False
    reach: float = 60.0  # of the joints; 0: actions are displacements
    parts: dict[str, Any] = field(default_factory=dict)  # modality.json's state and action, where there is one
    tasks: tuple[str, ...] = ("put the pen into the cup",)

    def names(self, what: str) -> list[str]:
        """As the task's dims are called: parts with numbers, LeRobot's names, or places where two are called alike."""
        if self.parts:
            return [f"{name}.{k}" for name, e in self.parts[what].items() for k in range(e["end"] - e["start"])]
        (names,) = getattr(self, what).values()
        return names if len(set(names)) == len(names) else [f"{what[0]}{k}" for k in range(len(names))]


def _arm(*parts: tuple[str, int, int], **keys: str) -> dict[str, Any]:
    return {
        name: {"start": start, "end": end} | ({"original_key": keys[name]} if keys else {})
        for name, start, end in parts
    }


IMAGES, STATE = "observation.images.", "observation.state"
SO101 = _arm(("single_arm", 0, 5), ("gripper", 5, 6))
DROID = [("joint_position", 0, 7), ("gripper_position", 0, 1)]
SHAPES = [
    Shape(
        "so101", 30, {"front": IMAGES + "front", "wrist": IMAGES + "wrist"}, (480, 640),
        {STATE: [f"{j}.pos" for j in JOINTS]}, {"action": [f"{j}.pos" for j in JOINTS]},
        video=True, parts={"state": SO101, "action": SO101},
    ),
    Shape(
        "aloha", 50, {c: IMAGES + c for c in ("cam_high", "cam_left_wrist", "cam_right_wrist")}, (120, 160),
        {STATE: ARMS}, {"action": ARMS}, channels_first=True, reach=1.2,
    ),
    Shape(
        "droid", 15, {c: IMAGES + c for c in ("exterior_1_left", "exterior_2_left", "wrist_left")}, (180, 320),
        {f"{STATE}.{n}": [f"{n}_{k}" for k in range(end)] for n, _, end in DROID},
        {f"action.{n}": [f"{n}_{k}" for k in range(end)] for n, _, end in DROID},
        video=True, reach=1.5,
        parts={
            "state": _arm(*DROID, **{n: f"{STATE}.{n}" for n, _, _ in DROID}),
            "action": _arm(*DROID, **{n: f"action.{n}" for n, _, _ in DROID}),
        },
    ),
    Shape(
        "libero", 10, {"image": IMAGES + "image", "image2": IMAGES + "image2"}, (128, 128),
        {STATE: ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper", "gripper"]},
        {"action": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]}, reach=0.0,
    ),
    Shape(
        "two_tasks", 30, {"front": IMAGES + "front"}, (48, 64), {STATE: JOINTS}, {"action": JOINTS},
        tasks=("put the pen into the cup", "throw the pen away"),
    ),
]  # fmt: skip


def make(folder: Path, shape: Shape, episodes: int = 6, ticks: int = 24, video_mb: float | None = None) -> Path:
    """Written by LeRobot; an episode is a tick longer than the one before. video_mb: at which a video file ends."""
    from lerobot.datasets import LeRobotDataset

    rng, (h, w) = np.random.default_rng(0), shape.size
    order = (
        (["channels", "height", "width"], (3, h, w))
        if shape.channels_first
        else (["height", "width", "channels"], (h, w, 3))
    )
    image = {"dtype": "video" if shape.video else "image", "names": order[0], "shape": order[1]}
    features = {key: image for key in shape.cameras.values()}
    for key, names in (shape.state | shape.action).items():
        features[key] = {"dtype": "float32", "shape": (len(names),), "names": names}
    options = {"use_videos": shape.video, "video_files_size_in_mb": video_mb}
    dataset = LeRobotDataset.create("local/set", fps=shape.fps, features=features, root=folder, **options)
    for episode in range(episodes):
        state, action = _numbers(rng, shape, ticks + episode)
        looks = {key: _pictures(k, state, shape.size) for k, key in enumerate(shape.cameras.values())}
        for t in range(len(state)):
            frame = {"task": shape.tasks[episode % len(shape.tasks)]} | {key: seen[t] for key, seen in looks.items()}
            for parts, values in ((shape.state, state[t]), (shape.action, action[t])):
                ends = np.cumsum([len(names) for names in parts.values()])[:-1]
                frame |= dict(zip(parts, np.split(values, ends), strict=True))
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    if shape.parts:
        video = {name: {"original_key": key} for name, key in shape.cameras.items()}
        content = shape.parts | {
            "video": video,
            "annotation": {"human.task_description": {"original_key": "task_index"}},
        }
        (folder / "meta" / "modality.json").write_text(json.dumps(content))
    return folder


def _numbers(rng: np.random.Generator, shape: Shape, n: int) -> tuple[np.ndarray, np.ndarray]:
    """float32[n, s], float32[n, ad]: joints that follow targets, or a hand that moves by shares of 5 cm and 0.2 rad."""
    if not shape.reach:
        path = np.concatenate([smooth(rng, n, 3, 0.2), smooth(rng, n, 3, 0.5)], 1)
        move = np.diff(path, axis=0, append=path[-1:]) / [*[0.1] * 3, *[0.4] * 3]
        grip = np.where(np.arange(n) < n // 2, -1.0, 1.0)[:, None]
        move = move + rng.normal(0, 1e-3, move.shape)
        return np.float32(np.concatenate([path, 0.02 - 0.02 * grip, 0.02 * grip - 0.02], 1)), np.float32(
            np.concatenate([move.clip(-1, 1), grip], 1)
        )
    dims = sum(map(len, shape.state.values()))
    wish = np.concatenate([smooth(rng, n, dims - 1, shape.reach), np.where(np.arange(n) < n // 2, 1, 0.1)[:, None]], 1)
    wish[:, -1] *= shape.reach
    at, seen = wish[0].copy(), []
    for target in wish:
        seen.append(at + rng.normal(0, 1e-3 * shape.reach, dims))
        at = at + 0.5 * (target - at)
    return np.float32(seen), np.float32(wish)


def _pictures(camera: int, state: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[n, h, w, 3]: a square goes where the first two dims are, before a slope of the camera's own."""
    h, w = size
    slope = np.linspace(30, 200, w if camera % 2 else h)
    ground = np.broadcast_to(slope[None, :, None] if camera % 2 else slope[:, None, None], (h, w, 3)) * [
        1,
        0.5 + 0.2 * camera,
        0.6,
    ]
    frames = np.repeat(ground[None], len(state), 0)
    place = (state[:, :2] - state[:, :2].min(0)) / np.maximum(np.ptp(state[:, :2], axis=0), 1e-9)
    for frame, (down, right) in zip(frames, place, strict=True):
        y, x = int(down * 0.75 * h), int(right * 0.75 * w)
        frame[y : y + h // 4, x : x + w // 4] = (240, 60, 40 + 60 * camera)
    return frames.astype(np.uint8)


class Theirs:
    """A set as LeRobotDataset reads it, row by row; nothing of this project's reader is asked."""

    def __init__(self, folder: Path, shape: Shape, horizon: int) -> None:
        from lerobot.datasets import LeRobotDataset

        times = {key: [k / shape.fps for k in range(horizon)] for key in shape.action}
        self._shape, self._horizon = shape, horizon
        self._rows = LeRobotDataset("local/set", root=folder, delta_timestamps=times, video_backend=video_backend())

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> list[int]:
        return list(self._rows.meta.episodes["length"])

    def batch(self, rows: list[int]) -> ChunkBatch:
        """These rows as an agent takes them."""
        items, b = [self._rows[row] for row in rows], len(rows)
        action = [torch.cat([i[k].reshape(self._horizon, -1) for k in self._shape.action], 1) for i in items]
        return ChunkBatch(
            images={name: np.stack([_picture(i[key]) for i in items]) for name, key in self._shape.cameras.items()},
            state=np.stack([torch.cat([i[key].reshape(-1) for key in self._shape.state]).numpy() for i in items]),
            action=torch.stack(action).numpy(),
            is_pad=np.stack([i[f"{next(iter(self._shape.action))}_is_pad"].numpy() for i in items]),
            demo=np.ones(b, bool),
            operator=np.zeros(b, bool),
            weight=np.ones(b, np.float32),
            prompts=[i["task"] for i in items],
        )

    def spec(self) -> TaskSpec:
        """The task that a person would write for it: what was recorded, with a little room."""
        every, shape = self.batch(list(range(len(self)))), self._shape
        ranges = {}
        for what, values in (("state", every.state), ("action", every.action[:, 0])):
            low, high = values.min(0).astype(float), values.max(0).astype(float)
            room = 0.1 * (high - low) + 1e-3
            ranges |= {
                f"{what}_names": shape.names(what),
                f"{what}_low": (low - room).tolist(),
                f"{what}_high": (high + room).tolist(),
            }
        cameras = {name: list(seen.shape[1:3]) for name, seen in every.images.items()}
        told = {
            "name": shape.name,
            "prompt": every.prompts[0],
            "cameras": cameras,
            "control_hz": shape.fps,
            "max_ticks": 400,
        }
        return TaskSpec.from_dict(told | ranges)


def _picture(values: torch.Tensor) -> np.ndarray:
    """uint8[h, w, 3] of float32[3, h, w] in [0, 1]."""
    return (values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def as_v21(folder: Path, old: Path) -> Path:
    """The same set as LeRobot 2.1 laid it out: files of an episode each, which videos must have, and JSON lines."""
    shutil.copytree(
        folder, old, ignore=lambda _, names: {"data", "videos", "episodes", "tasks.parquet", "stats.json"} & {*names}
    )
    info = json.loads((folder / "meta" / "info.json").read_text())
    table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "data").rglob("*.parquet"))])
    episodes = [
        row
        for path in sorted((folder / "meta" / "episodes").rglob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    for episode in episodes:
        number = episode["episode_index"]
        rows = table.slice(episode["dataset_from_index"], episode["length"])
        (old / "data" / "chunk-000").mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, old / "data" / "chunk-000" / f"episode_{number:06d}.parquet")
        for key in videos:
            assert episode[f"videos/{key}/from_timestamp"] == 0, "a file of its own"
            chunk, file = (episode[f"videos/{key}/{n}_index"] for n in ("chunk", "file"))
            (old / "videos" / "chunk-000" / key).mkdir(parents=True, exist_ok=True)
            shutil.copy(
                folder / "videos" / key / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4",
                old / "videos" / "chunk-000" / key / f"episode_{number:06d}.mp4",
            )
    info |= {
        "codebase_version": "v2.1",
        "total_chunks": 1,
        "total_videos": len(videos) * len(episodes),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if videos
        else None,
    }
    (old / "meta" / "info.json").write_text(json.dumps(info))
    tasks = pd.read_parquet(folder / "meta" / "tasks.parquet")
    _write_lines(
        old / "meta" / "tasks.jsonl", [{"task_index": int(k), "task": text} for text, k in tasks["task_index"].items()]
    )
    _write_lines(
        old / "meta" / "episodes.jsonl", [{k: e[k] for k in ("episode_index", "tasks", "length")} for e in episodes]
    )
    _write_lines(
        old / "meta" / "episodes_stats.jsonl",
        [{"episode_index": e["episode_index"], "stats": _stats(e)} for e in episodes],
    )
    return old


def _stats(episode: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """key -> statistic -> value, of those that LeRobot 2.1 had."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in episode.items():
        _, _, rest = name.partition("stats/")
        key, _, statistic = rest.rpartition("/")
        if statistic in ("min", "max", "mean", "std", "count"):
            found.setdefault(key, {})[statistic] = value
    return found


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
