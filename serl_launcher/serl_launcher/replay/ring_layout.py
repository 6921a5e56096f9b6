"""Where everything lies inside a replay ring file, and where the file itself may lie.

Callers: `ring.py`, `tools/preflight.py`. A ring file is one fully reserved block: a header (magic, what the layout
follows from), four committed counters, the frame arrays, the episode table, the prompts. Pictures that memory has no
room for lie in a second file (`ring_cold.py`), which the header names. A reader needs nothing but the file's path.
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

MAGIC = b"FSRING05"
HEADER_BYTES = 65536
COUNTERS_OFFSET = HEADER_BYTES
ALIGN = 4096
SHARED_MEMORY = Path("/dev/shm")

EPISODE_COLUMNS = ("ordinal", "first_frame", "n_ticks", "mode", "success", "prompt", "prompt_bytes", "key")
MEMORY_SHARE = 0.5  # of the machine's memory, replay.memory_share where a config lacks it
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
    """The whole map of a ring file: a function of what its header holds as JSON.

    capacity: frames (observation slots); hot: how many of them have their pictures in this file, all when None;
    cold_path: the file of the others' pictures. RingError when capacity is less than 2, or the header does not fit.
    """

    def __init__(
        self,
        cameras: Mapping[str, tuple[int, int]],
        state_dim: int,
        action_dim: int,
        capacity: int,
        hot: int | None = None,
        cold_path: str | None = None,
    ) -> None:
        if capacity < 2:
            raise RingError(f"replay.capacity_frames must be at least 2 (one tick, two observations), got {capacity}")
        self.capacity, self.hot = capacity, capacity if hot is None else hot
        self.cold_path = None if cold_path is None else Path(cold_path)
        said = [dict(cameras), state_dim, action_dim, capacity, self.hot, cold_path]
        self.header = MAGIC + json.dumps(said).encode()
        if len(self.header) > HEADER_BYTES:
            raise RingError(f"the ring header needs {len(self.header)} bytes, {HEADER_BYTES} fit: too many cameras")
        offset = COUNTERS_OFFSET + ALIGN
        self.arrays: dict[str, ArrayPlace] = {}  # shapes start with `capacity`, of pictures with `hot`
        self.cold: dict[str, ArrayPlace] = {}  # in the other file, from slot `hot` on
        self.cold_bytes = 0
        for key, (dtype, shape) in frame_arrays(cameras, state_dim, action_dim).items():
            slots = self.hot if key.startswith(IMAGE_PREFIX) else capacity
            self.arrays[key] = ArrayPlace(dtype, (slots, *shape), offset)
            offset = _aligned(offset + self.arrays[key].nbytes)
            if slots < capacity:
                self.cold[key] = ArrayPlace(dtype, (capacity - slots, *shape), self.cold_bytes)
                self.cold_bytes = _aligned(self.cold_bytes + self.cold[key].nbytes)
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


@dataclass(frozen=True, slots=True)
class Placing:
    """Where a ring will lie."""

    folder: Path  # of the ring's file
    hot: int  # frames whose pictures lie in it; those of the others lie in the run's folder
    words: str  # for people


def place_ring(
    shape: tuple[Mapping[str, tuple[int, int]], int, int],
    capacity: int,
    run_dir: Path,
    shared: Path = SHARED_MEMORY,
    memory_share: float = MEMORY_SHARE,
) -> Placing:
    """Shared memory as far as `memory_share` of the machine's memory goes, and a tenth of what is free there is left;
    the pictures of the other frames in the run's folder. All of it there without shared memory. RingError: nowhere.

    shape: cameras, state dims, action dims.
    """
    whole, bare = RingLayout(*shape, capacity), RingLayout(*shape, capacity, 0)
    free, disk = _free_bytes(shared), _free_bytes(run_dir)
    memory = 0.0 if free is None else 0.9 * free
    if shared == SHARED_MEMORY:  # what lies there is memory
        machine = psutil.virtual_memory()
        memory = min(memory, 0.9 * machine.available, memory_share * machine.total)
    if whole.total_bytes <= memory:
        return Placing(shared, capacity, f"{capacity} frames, {_gib(whole.total_bytes)} in {shared}")
    picture = sum(prod(place.shape[1:]) for place in bare.cold.values())
    spare = int(memory) - bare.total_bytes - ALIGN * len(bare.cold)
    hot = min(capacity - 1, max(0, spare) // picture) if picture else 0
    if hot and disk is not None and RingLayout(*shape, capacity, hot).cold_bytes <= 0.9 * disk:
        layout = RingLayout(*shape, capacity, hot)
        return Placing(shared, hot, (
            f"{capacity} frames, {hot} of them in {_gib(layout.total_bytes)} of {shared} (replay.memory_share="
            f"{memory_share:g}), the pictures of the other {capacity - hot} in {_gib(layout.cold_bytes)} of {run_dir}: "
            "batches wait for that disk where its cache does not hold them"
        ))  # fmt: skip
    if disk is not None and whole.total_bytes <= 0.9 * disk:
        return Placing(run_dir, capacity, f"{capacity} frames, {_gib(whole.total_bytes)} in {run_dir}, a disk: "
                       f"{shared} has no room for it")  # fmt: skip
    raise RingError(
        f"the replay ring needs {_gib(whole.total_bytes)} ({capacity} frames of "
        f"{whole.total_bytes / capacity / 1024:.1f} KiB) and fits nowhere ({shared}: {_room(free)}, "
        f"{_gib(memory)} of it for a ring by replay.memory_share={memory_share:g}; {run_dir}: {_room(disk)}). "
        "Lower replay.capacity_frames or free some space."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _room(free: float | None) -> str:
    return "missing or not writable" if free is None else f"{_gib(free)} free"


def _free_bytes(folder: Path) -> float | None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None
    return shutil.disk_usage(folder).free


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN
