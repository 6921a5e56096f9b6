"""Supervised fine-tuning on a LeRobot dataset, without actors: dataset ─▶ chunks ─▶ agent ─▶ optimizer.

examples/train_sft.py and the tests call `train`. The agent, its loss and the learner are those of the online runs; only
where batches come from differs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from serl_launcher.datasets.dataset import Rows
from serl_launcher.learner.learner import Learner, Schedule
from serl_launcher.replay.views import ChunkBatch


class Chunks(torch.utils.data.Dataset):
    """Rows of a LeRobot dataset, each with the chunk of actions that begins there (padded at the episode's end)."""

    def __init__(self, rows: Rows, horizon: int, max_samples: int | None = None) -> None:
        self.rows, self.spec, self.bounds, self._horizon = rows, rows.spec, rows.bounds, horizon
        self.length = len(rows) if max_samples is None else min(max_samples, len(rows))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        action, is_pad = self.rows.chunk(index, self._horizon)
        images = {f"image.{camera}": picture[0] for camera, picture in self.rows.images([index]).items()}
        prompt = self.rows.prompt(index)
        return images | {"state": self.rows.state[index], "action": action, "is_pad": is_pad, "prompt": prompt}

    def collate(self, rows: list[dict[str, Any]]) -> ChunkBatch:
        """Rows to the batch that agents take."""
        stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "prompt"}
        b = len(rows)
        return ChunkBatch(
            images={camera: stacked[f"image.{camera}"] for camera in self.spec.cameras},
            state=stacked["state"],
            action=stacked["action"],
            is_pad=stacked["is_pad"],
            demo=np.ones(b, bool),
            operator=np.zeros(b, bool),
            weight=np.ones(b, np.float32),
            prompts=[row["prompt"] for row in rows],
        )


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
