"""Supervised fine-tuning on a LeRobot dataset, without actors: dataset ─▶ chunks ─▶ agent ─▶ optimizer.

examples/train_sft.py and the tests call `train`. The agent, its loss and the learner are those of the online runs; only
where batches come from differs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from serl_launcher.learner.learner import Learner, Schedule
from serl_launcher.replay.views import ChunkBatch
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a task's cameras, state and action lie in a dataset's rows."""

    images: dict[str, str]  # camera -> key
    state: list[tuple[str, slice]]  # parts, concatenated
    action: list[tuple[str, slice]]

    @classmethod
    def plain(cls, spec: TaskSpec) -> "Columns":
        """LeRobot's own names."""
        images = {camera: f"observation.images.{camera}" for camera in spec.cameras}
        return cls(images, [("observation.state", slice(None))], [("action", slice(None))])


def open_dataset(folder: Path, **options: Any) -> Any:
    """LeRobot's reader on a local folder; options: further arguments of `LeRobotDataset`."""
    from lerobot.datasets import LeRobotDataset

    return LeRobotDataset(f"local/{folder.name}", root=folder, video_backend=video_backend(), **options)


def video_backend() -> str:
    """LeRobot's name of what decodes videos here: torchcodec where it loads, which needs FFmpeg, else pyav.

    Left to itself LeRobot takes the same one, after printing every way in which torchcodec was looked for.
    """
    try:
        import torchcodec  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return "pyav"
    return "torchcodec"


class Chunks(torch.utils.data.Dataset):
    """Rows of a LeRobot dataset, each with the chunk of actions that begins there (padded at the episode's end)."""

    def __init__(self, folder: Path, spec: TaskSpec, horizon: int, columns: Columns, max_samples: int | None) -> None:
        from lerobot.datasets import LeRobotDatasetMetadata

        meta = LeRobotDatasetMetadata("local/sft", root=folder)
        keys = sorted({key for key, _ in columns.action})
        offsets = [k / meta.fps for k in range(horizon)]
        self.rows = open_dataset(folder, delta_timestamps={key: offsets for key in keys})
        self.spec, self.columns, self.padding = spec, columns, f"{keys[0]}_is_pad"
        self.length = len(self.rows) if max_samples is None else min(max_samples, len(self.rows))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        images = {
            c: (row[key].permute(1, 2, 0) * 255).round().to(torch.uint8) for c, key in self.columns.images.items()
        }
        parts = {
            "state": torch.cat([row[key][..., part] for key, part in self.columns.state], -1),
            "action": torch.cat([row[key][..., part] for key, part in self.columns.action], -1),
            "is_pad": row[self.padding],
        }
        tensors = {f"image.{c}": x for c, x in images.items()} | parts
        return {key: x.numpy() for key, x in tensors.items()} | {"prompt": row["task"]}

    def collate(self, rows: list[dict[str, Any]]) -> ChunkBatch:
        """Rows to the batch that agents take."""
        stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "prompt"}
        b = len(rows)
        return ChunkBatch(
            images={camera: stacked[f"image.{camera}"] for camera in self.columns.images},
            state=stacked["state"].astype(np.float32),
            action=stacked["action"].astype(np.float32),
            is_pad=stacked["is_pad"],
            demo=np.ones(b, bool),
            operator=np.zeros(b, bool),
            weight=np.ones(b, np.float32),
            prompts=[row["prompt"] for row in rows],
        )


def check_columns(features: dict[str, Any], columns: Columns, spec: TaskSpec) -> None:
    """Raise ValueError naming a column that the dataset lacks or whose size is not the task's."""
    for camera, key in columns.images.items():
        if key not in features:
            raise ValueError(f"dataset: camera {camera!r}: no column {key!r}; it has {_images(features)}")
    for what, parts, names in (
        ("state", columns.state, spec.state_names),
        ("action", columns.action, spec.action_names),
    ):
        size = 0
        for key, part in parts:
            if key not in features:
                raise ValueError(f"dataset: {what}: no column {key!r}")
            size += len(range(*part.indices(features[key]["shape"][0])))
        if size != len(names):
            raise ValueError(f"dataset: {what}: expected {len(names)} dims as the task, got {size}")


def _images(features: dict[str, Any]) -> list[str]:
    return sorted(key for key, feature in features.items() if feature["dtype"] in ("image", "video"))


def spec_of(meta: Any, columns: Columns, state_names: list[str] | None, action_names: list[str] | None) -> TaskSpec:
    """The task that a dataset describes: its cameras and sizes, its first prompt, the range of its values.

    Names of the dims, such as modality.json gives, or None. Raises ValueError naming a column that the dataset lacks or
    whose size is another.
    """
    state_low, state_high = _range(meta, columns.state)
    action_low, action_high = _range(meta, columns.action)
    for camera, key in columns.images.items():
        if key not in meta.features:
            raise ValueError(f"dataset: camera {camera!r}: no column {key!r}; it has {_images(meta.features)}")
    for what, names, low in (("state", state_names, state_low), ("action", action_names, action_low)):
        if names and len(names) != len(low):
            raise ValueError(f"dataset: {what}: expected {len(names)} dims as in modality.json, got {len(low)}")
    return TaskSpec.from_dict(
        {
            "name": "dataset",
            "prompt": str(meta.tasks.index[0]),
            "cameras": {c: [int(n) for n in meta.features[key]["shape"][:2]] for c, key in columns.images.items()},
            "state_names": state_names or [f"s{k}" for k in range(len(state_low))],
            "state_low": state_low,
            "state_high": state_high,
            "action_names": action_names or [f"a{k}" for k in range(len(action_low))],
            "action_low": action_low,
            "action_high": action_high,
            "control_hz": float(meta.fps),
            "max_ticks": int(max(meta.episodes["length"])),
        }
    )


def _range(meta: Any, parts: list[tuple[str, slice]]) -> tuple[list[float], list[float]]:
    """Lowest and highest recorded values; a dim that never moved gets a range around its value."""
    for key, _ in parts:
        if key not in meta.stats:
            raise ValueError(f"dataset: no column {key!r} with statistics; it has {sorted(meta.stats)}")
    low, high = (np.concatenate([np.asarray(meta.stats[k][n])[part] for k, part in parts]) for n in ("min", "max"))
    flat = high <= low
    return np.where(flat, low - 1, low).tolist(), np.where(flat, high + 1, high).tolist()


def check_batch(chunks: Chunks, batch_size: int) -> None:
    """Raise ValueError when the dataset does not fill one batch."""
    if len(chunks) < batch_size:
        raise ValueError(f"dataset: {len(chunks)} samples do not fill a batch of {batch_size}")


def batches(chunks: Chunks, batch_size: int, seed: int, workers: int = 0) -> Iterator[ChunkBatch]:
    """Shuffled batches for ever; the last, smaller one of an epoch is dropped. Raises as `check_batch`."""
    check_batch(chunks, batch_size)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        chunks,
        batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=chunks.collate,
        generator=order,
        num_workers=workers,
    )
    while True:
        yield from loader


def train(
    learner: Learner, chunks: Chunks, steps: int, batch_size: int, seed: int, schedule: Schedule
) -> Iterator[dict]:
    """`steps` optimizer steps; yields each one's metrics as `Learner.step` returns them."""
    source = batches(chunks, batch_size, seed)
    for step in range(steps):
        yield learner.step(next(source), schedule.scale(step))
