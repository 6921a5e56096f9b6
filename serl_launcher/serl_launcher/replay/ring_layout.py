"""Where everything lies inside a replay ring file, and where the file itself may lie.

`ring.py` is the only caller. A ring file is one fully reserved block: a header (magic, what the layout follows from),
four committed counters, the frame arrays, the episode table, the prompts. A reader needs nothing but the file's path.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import psutil

from serl_transport.contract.schema import IMAGE_PREFIX

MAGIC = b"FSRING04"
HEADER_BYTES = 65536
COUNTERS_OFFSET = HEADER_BYTES
ALIGN = 4096
SHARED_MEMORY = Path("/dev/shm")

EPISODE_COLUMNS = ("ordinal", "first_frame", "n_ticks", "mode", "success", "prompt", "prompt_bytes", "key")
PROMPT_BYTES = 1 << 20  # of all different prompts together: some twenty thousand


class RingError(RuntimeError):
    """The ring cannot be made or read as asked; the message says which key or file to change."""


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """One array of the ring: `capacity` slots of one dtype and shape, from `offset` on."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class RingLayout:
    """The whole map of a ring file: a function of four values, which the file's header holds as JSON.

    capacity: frames (observation slots). Raises RingError when that is less than 2, or the header does not fit.
    """

    def __init__(self, cameras: Mapping[str, tuple[int, int]], state_dim: int, action_dim: int, capacity: int) -> None:
        if capacity < 2:
            raise RingError(f"replay.capacity_frames must be at least 2 (one tick, two observations), got {capacity}")
        self.capacity = capacity
        self.header = MAGIC + json.dumps([dict(cameras), state_dim, action_dim, capacity]).encode()
        if len(self.header) > HEADER_BYTES:
            raise RingError(f"the ring header needs {len(self.header)} bytes, {HEADER_BYTES} fit: too many cameras")
        offset = COUNTERS_OFFSET + ALIGN
        self.arrays: dict[str, ArrayPlace] = {}  # shapes start with `capacity`
        for key, (dtype, shape) in frame_arrays(cameras, state_dim, action_dim).items():
            self.arrays[key] = ArrayPlace(dtype, (capacity, *shape), offset)
            offset = _aligned(offset + self.arrays[key].nbytes)
        self.episode_rows = capacity // 2 + 1  # the shortest episode takes two frames: never the bottleneck
        self.table = ArrayPlace("int64", (self.episode_rows, len(EPISODE_COLUMNS)), offset)
        self.prompts = ArrayPlace("uint8", (PROMPT_BYTES,), _aligned(offset + self.table.nbytes))
        self.total_bytes = self.prompts.offset + PROMPT_BYTES

    @classmethod
    def read(cls, path: Path) -> "RingLayout":
        """Of an existing file; RingError when it is gone, or no ring of this version."""
        try:
            with path.open("rb") as file:
                raw = file.read(HEADER_BYTES)
        except FileNotFoundError:
            raise RingError(f"no replay ring at {path}: the gateway has replaced it; ask its status again") from None
        if not raw.startswith(MAGIC):
            raise RingError(f"{path} is no replay ring: expected magic {MAGIC!r}, got {raw[:8]!r}")
        return cls(*json.loads(raw[len(MAGIC) :].rstrip(b"\0")))


def frame_arrays(
    cameras: Mapping[str, tuple[int, int]], state_dim: int, action_dim: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> (dtype, per-frame shape) of everything a frame holds; the keys are those of a StepBatch."""
    flags = ("next.done", "next.truncated", "next.success", "intervention")
    return {
        **{f"{IMAGE_PREFIX}{camera}": ("uint8", (h, w, 3)) for camera, (h, w) in cameras.items()},
        "observation.state": ("float32", (state_dim,)),
        "action": ("float32", (action_dim,)),
        "next.reward": ("float32", ()),
        **{flag: ("bool", ()) for flag in flags},
        "policy_version": ("int64", ()),
    }


def choose_folder(total_bytes: int, capacity_frames: int, run_dir: Path, shared: Path = SHARED_MEMORY) -> Path:
    """Shared memory when the ring fits there with a tenth to spare, else the run folder, else RingError.

    What lies in shared memory is memory: there the machine's available memory bounds it too.
    """
    tried = []
    for folder in (shared, run_dir):
        free = _free_bytes(folder)
        if free is not None and folder == SHARED_MEMORY:
            free = min(free, psutil.virtual_memory().available)
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
    return shutil.disk_usage(folder).free


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN
