"""Where everything lies inside a replay ring file, and where the file itself may lie.

`ring.py` is the only caller. A ring file is one fully reserved block: a header (magic, the layout as JSON), four
committed counters, the frame arrays, the episode table. A reader needs nothing but the file's path.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

MAGIC = b"FSRING01"
HEADER_BYTES = 65536
COUNTERS_OFFSET = HEADER_BYTES
ALIGN = 4096
SHARED_MEMORY = Path("/dev/shm")

MODES = ("demo", "online", "eval")
EPISODE_COLUMNS = ("ordinal", "first_frame", "n_ticks", "mode", "success", "interventions")
IMAGE_PREFIX = "observation.images."


class RingError(RuntimeError):
    """The ring cannot be made or read as asked; the message says which key or file to change."""


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """One array of the ring: `capacity` slots of one dtype and shape, from `offset` on."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class RingLayout:
    """The whole map of a ring file, stored as JSON in its header."""

    capacity: int  # frames (observation slots)
    episode_rows: int  # rows of the episode table
    arrays: dict[str, ArrayPlace]  # key -> place; shapes start with `capacity`
    table: ArrayPlace  # int64[episode_rows, 6], columns EPISODE_COLUMNS
    total_bytes: int

    def to_header(self) -> bytes:
        """Magic, JSON length, JSON."""
        body = {
            "capacity": self.capacity,
            "episode_rows": self.episode_rows,
            "arrays": {k: [p.dtype, list(p.shape), p.offset] for k, p in self.arrays.items()},
            "table": [self.table.dtype, list(self.table.shape), self.table.offset],
            "total_bytes": self.total_bytes,
        }
        text = json.dumps(body).encode()
        if len(text) + 16 > HEADER_BYTES:
            raise RingError(f"the ring header needs {len(text)} bytes, {HEADER_BYTES - 16} fit: too many cameras")
        return MAGIC + struct.pack("<Q", len(text)) + text

    @staticmethod
    def from_header(raw: bytes, path: Path) -> RingLayout:
        """Parse a header; RingError when the file is not a ring of this version."""
        if raw[:8] != MAGIC:
            raise RingError(f"{path} is no replay ring: expected magic {MAGIC!r}, got {raw[:8]!r}")
        (length,) = struct.unpack("<Q", raw[8:16])
        body = json.loads(raw[16 : 16 + length])

        def place(row: list) -> ArrayPlace:
            return ArrayPlace(row[0], tuple(row[1]), row[2])

        return RingLayout(
            body["capacity"],
            body["episode_rows"],
            {k: place(row) for k, row in body["arrays"].items()},
            place(body["table"]),
            body["total_bytes"],
        )


def frame_arrays(
    cameras: Mapping[str, tuple[int, int]], state_dim: int, action_dim: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> (dtype, per-frame shape) of everything a frame holds; the keys are those of a StepBatch."""
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{IMAGE_PREFIX}{camera}": ("uint8", (h, w, 3)) for camera, (h, w) in cameras.items()
    }
    arrays["observation.state"] = ("float32", (state_dim,))
    arrays["action"] = ("float32", (action_dim,))
    arrays["next.reward"] = ("float32", ())
    for flag in ("next.done", "next.truncated", "next.success", "intervention"):
        arrays[flag] = ("bool", ())
    arrays["policy_version"] = ("int64", ())
    return arrays


def plan_layout(
    cameras: Mapping[str, tuple[int, int]], state_dim: int, action_dim: int, capacity_frames: int
) -> RingLayout:
    """Lay out a ring of `capacity_frames` observation slots."""
    if capacity_frames < 2:
        raise RingError(
            f"replay.capacity_frames must be at least 2 (one tick, two observations), got {capacity_frames}"
        )
    offset = COUNTERS_OFFSET + ALIGN
    places: dict[str, ArrayPlace] = {}
    for key, (dtype, shape) in frame_arrays(cameras, state_dim, action_dim).items():
        full = (capacity_frames, *shape)
        places[key] = ArrayPlace(dtype, full, offset)
        offset = _aligned(offset + prod(full) * np.dtype(dtype).itemsize)
    rows = capacity_frames // 2 + 1  # the shortest episode takes two frames: the table can never be the bottleneck
    table = ArrayPlace("int64", (rows, len(EPISODE_COLUMNS)), offset)
    return RingLayout(capacity_frames, rows, places, table, _aligned(offset + rows * len(EPISODE_COLUMNS) * 8))


def choose_folder(total_bytes: int, capacity_frames: int, run_dir: Path, shared: Path = SHARED_MEMORY) -> Path:
    """Shared memory when the ring fits there with a tenth to spare, else the run folder, else RingError.

    What lies in shared memory is memory: there the machine's available memory bounds it too.
    """
    tried = []
    for folder in (shared, run_dir):
        free = _free_bytes(folder)
        if free is not None and folder == SHARED_MEMORY:
            free = min(free, _available_memory())
        if free is None:
            tried.append(f"{folder}: missing or not writable")
        elif total_bytes > free * 0.9:
            tried.append(f"{folder}: {free / 2**20:.0f} MiB free")
        else:
            return folder
    per_frame = total_bytes / capacity_frames
    raise RingError(
        f"the replay ring needs {total_bytes / 2**20:.0f} MiB ({capacity_frames} frames of {per_frame / 1024:.1f} KiB) "
        f"and fits nowhere ({'; '.join(tried)}). Lower replay.capacity_frames or free some space."
    )


def _free_bytes(folder: Path) -> float | None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def _available_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    kilobytes = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * kb for kb in kilobytes), float("inf"))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN
