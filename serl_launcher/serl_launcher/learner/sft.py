"""A LeRobot dataset as fine-tuning reads it: rows ─▶ chunks of actions ─▶ the batches that agents take.

examples/train_sft.py opens it (serl_launcher.datasets), learner.sampling draws from it.
"""

from typing import Any

import numpy as np
import torch

from serl_launcher.datasets.dataset import Rows
from serl_launcher.replay.views import ChunkBatch


class Chunks(torch.utils.data.Dataset):
    """Rows of a LeRobot dataset, each with the chunk of actions that begins there (padded at the episode's end)."""

    def __init__(self, rows: Rows, horizon: int) -> None:
        self.rows, self.spec, self.bounds, self._horizon = rows, rows.spec, rows.bounds, horizon

    def __len__(self) -> int:
        return len(self.rows)

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
