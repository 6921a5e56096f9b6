"""Index views over the replay ring: which ticks a training chunk may start at, and their batches.

The trainer owns one `ChunkView`. It reads newly committed episodes from the ring (replay.ring), asks the acceptance
rule about each, keeps the indices, and gathers batches by index: nothing is copied or deleted when a rule changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serl_launcher.replay.acceptance import EpisodeColumns, Selection
from serl_launcher.replay.ring import EpisodeRow, Evicted, RingReader
from serl_transport.specs import TaskSpec

COLUMNS = ("action", "next.reward", "intervention")


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """A training batch of action chunks."""

    images: dict[str, np.ndarray]  # camera -> uint8[b, h, w, 3], at the chunk's first tick
    state: np.ndarray  # float32[b, s]
    action: np.ndarray  # float32[b, ah, ad], executed, physical units; padded with the last tick's
    is_pad: np.ndarray  # bool[b, ah], past the episode's end or not a label
    demo: np.ndarray  # bool[b], from a demonstration
    operator: np.ndarray  # bool[b], the operator drove the first tick

    def __len__(self) -> int:
        return len(self.state)


class ChunkView:
    """The accepted ticks of a ring, as chunk starts."""

    def __init__(self, rule: Callable[[EpisodeColumns], Selection], spec: TaskSpec, horizon: int) -> None:
        low, high = np.float32(spec.action_low), np.float32(spec.action_high)
        self._rule, self._horizon = rule, horizon
        self._offset, self._scale = (high + low) / 2, (high - low) / 2
        self._cameras = tuple(spec.cameras)
        self._ring: RingReader | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every index; the next `refresh` rebuilds them from the ring."""
        self._next_ordinal = 0
        self._frames = np.zeros((0, self._horizon), np.int64)  # absolute frame of each chunk tick, clipped at the end
        self._is_pad = np.zeros((0, self._horizon), bool)
        self._demo = np.zeros(0, bool)
        self.accepted: dict[str, int] = {"demo": 0, "online": 0}
        self.reasons: dict[str, int] = {}

    def attach(self, ring: RingReader) -> None:
        """Read from this ring; a new one (the gateway restarted) starts the view over."""
        if ring is not self._ring:
            self._ring = ring
            self.clear()

    def __len__(self) -> int:
        return len(self._frames)

    def refresh(self) -> int:
        """Take in the episodes committed since the last call; returns how many."""
        rows = self._ring.episodes(self._next_ordinal)
        for row in rows:
            self._next_ordinal = row.ordinal + 1
            try:
                self._add(row)
            except Evicted:  # the writer lapped a reader that slept for a whole ring: that episode is gone for all
                continue
        if rows:
            self._drop_before(self._ring.first_valid)
        return len(rows)

    def _add(self, row: EpisodeRow) -> None:
        n = row.n_ticks
        ticks = np.arange(row.first_frame, row.first_frame + n)
        columns = self._ring.gather(ticks, COLUMNS)
        selection = self._rule(
            EpisodeColumns(
                mode=row.mode,
                success=row.success,
                reward=columns["next.reward"],
                action=(columns["action"] - self._offset) / self._scale,
                intervention=columns["intervention"],
            )
        )
        self.reasons[selection.reason] = self.reasons.get(selection.reason, 0) + 1
        if not selection.accepted:
            return
        self.accepted[row.mode] = self.accepted.get(row.mode, 0) + 1
        starts = np.flatnonzero(selection.starts)
        steps = starts[:, None] + np.arange(self._horizon)
        inside = np.minimum(steps, n - 1)
        self._frames = np.concatenate([self._frames, row.first_frame + inside])
        self._is_pad = np.concatenate([self._is_pad, (steps >= n) | ~selection.labels[inside]])
        self._demo = np.concatenate([self._demo, np.full(len(starts), row.mode == "demo")])

    def _drop_before(self, first_frame: int) -> None:
        keep = self._frames[:, 0] >= first_frame
        if not keep.all():
            self._frames, self._is_pad, self._demo = self._frames[keep], self._is_pad[keep], self._demo[keep]

    def sample(self, rng: np.random.Generator, b: int) -> ChunkBatch:
        """b chunks drawn uniformly over the accepted starts. Raises ValueError when there are none."""
        while True:
            if not len(self):
                raise ValueError("the view holds no accepted tick yet")
            rows = rng.integers(0, len(self), b)
            try:
                return self._gather(rows)
            except Evicted:
                self._drop_before(self._ring.first_valid)

    def _gather(self, rows: np.ndarray) -> ChunkBatch:
        frames = self._frames[rows]
        images = {camera: f"observation.images.{camera}" for camera in self._cameras}
        first = self._ring.gather(frames[:, 0], [*images.values(), "observation.state", "intervention"])
        chunk = self._ring.gather(frames, ["action"])["action"]
        return ChunkBatch(
            images={camera: first[key] for camera, key in images.items()},
            state=first["observation.state"],
            action=chunk,
            is_pad=self._is_pad[rows],
            demo=self._demo[rows],
            operator=first["intervention"],
        )
