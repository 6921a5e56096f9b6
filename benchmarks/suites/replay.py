"""Sampling from the replay ring against the machine's memory copy, beside LeRobot's buffer and torchrl's storage.

A batch is 64 transitions, three cameras of 224², s and s′, chunks of 50 ticks: 57.8 MB of pictures. The floor copies as
many bytes from places of the same memory into a buffer that is there. Seconds are those of one core. The others hold
the same pictures in their own way (LeRobot as float32), each in a process of its own; torchrl is no dependency of this
project: where it is installed elsewhere, TORCHRL_FOLDER names the folder.
"""

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Row, alternate
from suites._apart import apart

from serl_launcher.replay.ring import RingReader, RingWriter
from serl_launcher.replay.transitions import TransitionView
from serl_transport.contract.specs import TaskSpec

BATCH, SIDE, CHUNK, CAMERAS, STATE, ACTION = 64, 224, 50, ("front", "left", "wrist"), 14, 14
TICKS, EPISODES = 99, 10  # 1000 observations, 452 MB: far more than the caches hold
PICTURE = SIDE * SIDE * 3
NAME = f"batch{BATCH}_{len(CAMERAS)}x{SIDE}_s_and_next_chunk{CHUNK}"
WARM = 3  # batches before the first that counts
OTHERS_FRAMES = 200  # of LeRobot's float32 pictures: 361 MB


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    torch.set_num_threads(1)
    rounds = 5 if quick else 40
    with tempfile.TemporaryDirectory() as folder:
        ring = filled(Path(folder), EPISODES)
        try:
            view = TransitionView(spec(), CHUNK, 0.99, 0.5)
            view.attach(RingReader(ring.path))
            view.refresh()
            rng = np.random.default_rng(0)
            copy = floor_of(ring)
            for _ in range(WARM):
                view.sample(rng, BATCH)
            found = alternate({"ours": seconds(lambda: view.sample(rng, BATCH)), "floor": seconds(copy)}, rounds)
        finally:
            ring.close()
    yield Row.of(f"replay/memcpy/{NAME}", BATCH / found["floor"], "transitions/s")
    yield Row.of(f"replay/ring/{NAME}", BATCH / found["ours"], "transitions/s", BATCH / found["floor"], ">= 0.8")
    yield from apart("replay/lerobot", partial(of_lerobot, BATCH / found["floor"], 2 if quick else 8))
    yield from apart("replay/torchrl", partial(of_torchrl, BATCH / found["floor"], 2 if quick else 8))


def spec() -> TaskSpec:
    """A bimanual robot's task."""
    return TaskSpec.from_dict(
        {
            "name": "two_arms",
            "prompt": "put the cup on the plate",
            "control_hz": 30.0,
            "max_ticks": TICKS,
            "cameras": {camera: [SIDE, SIDE] for camera in CAMERAS},
            **{f"{what}_names": [f"{what}{k}" for k in range(n)] for what, n in (("state", STATE), ("action", ACTION))},
            **{f"{what}_{end}": [v] * STATE for what in ("state", "action") for end, v in (("low", -1), ("high", 1))},
        }
    )


def filled(folder: Path, episodes: int) -> RingWriter:
    """A ring of random episodes, half of them demonstrations, in shared memory where that has room."""
    rng, n = np.random.default_rng(0), TICKS
    ring = RingWriter(spec(), episodes * (n + 1), folder)
    last = np.arange(n) == n - 1
    flags = {"next.done": last, "next.truncated": last & False, "next.success": last, "intervention": last & False}
    for k in range(episodes):
        frames = {f"observation.images.{c}": rng.integers(0, 256, (n + 1, SIDE, SIDE, 3), np.uint8) for c in CAMERAS}
        numbers = {"observation.state": rng.random((n + 1, STATE), np.float32)}
        numbers |= {"action": rng.random((n, ACTION), np.float32), "next.reward": last.astype(np.float32)}
        arrays = frames | numbers | flags | {"policy_version": np.zeros(n, np.int64)}
        ring.append(k, "demo" if k % 2 else "online", True, arrays)
    return ring


def floor_of(ring: RingWriter) -> Callable[[], object]:
    """Copies the pictures of a batch as two runs of frames a camera, from a random place, into memory that is there."""
    rng = np.random.default_rng(1)
    sources = [ring._arrays[f"observation.images.{camera}"] for camera in CAMERAS]
    into = np.ones((2 * BATCH, SIDE, SIDE, 3), np.uint8)

    def copy() -> None:
        for source in sources:
            first = int(rng.integers(0, len(source) - 2 * BATCH))
            np.copyto(into, source[first : first + 2 * BATCH])

    return copy


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """What one call takes of a core: other processes of the machine do not count."""

    def timed() -> float:
        began = time.thread_time()
        work()
        return time.thread_time() - began

    return timed


def measured(name: str, sample: Callable[[], Any], floor: float, rounds: int) -> Row:
    """Transitions a second of another library, its first calls left out."""
    for _ in range(WARM):
        sample()
    taken = alternate({name: seconds(sample)}, rounds)[name]
    return Row.of(f"replay/{name}/{NAME}", BATCH / taken, "transitions/s", floor)


def of_lerobot(floor: float, rounds: int) -> Iterator[Row]:
    """LeRobot's ReplayBuffer in its frugal mode (s′ is the next row), without augmentation."""
    from lerobot.rl.buffer import ReplayBuffer

    torch.set_num_threads(1)
    buffer = ReplayBuffer(
        OTHERS_FRAMES, "cpu", [f"observation.images.{c}" for c in CAMERAS] + ["observation.state"],
        image_augmentation_function=lambda x: x, use_drq=False, optimize_memory=True,
    )  # fmt: skip
    for _ in range(OTHERS_FRAMES):
        seen = {f"observation.images.{c}": torch.rand(1, 3, SIDE, SIDE) for c in CAMERAS}
        seen["observation.state"] = torch.rand(1, STATE)
        buffer.add(seen, torch.rand(1, CHUNK * ACTION), 0.0, seen, False, False)
    yield measured("lerobot", lambda: buffer.sample(BATCH), floor, rounds)


def of_torchrl(floor: float, rounds: int) -> Iterator[Row]:
    """torchrl's TensorDictReplayBuffer over a memory-mapped file, uint8 pictures, s and s′ stored apart."""
    if folder := os.environ.get("TORCHRL_FOLDER"):
        sys.path.append(folder)
    try:
        from tensordict import TensorDict
        from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
    except ImportError as lack:
        yield Row.failed(f"replay/torchrl/{NAME}", f"not measured: {lack}; TORCHRL_FOLDER may name where it is")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        storage = LazyMemmapStorage(2 * OTHERS_FRAMES, scratch_dir=scratch)
        buffer = TensorDictReplayBuffer(storage=storage, batch_size=BATCH)
        for _ in range(2 * OTHERS_FRAMES // 50):
            seen, after = ({c: torch.randint(0, 256, (50, SIDE, SIDE, 3), dtype=torch.uint8) for c in CAMERAS}
                           | {"state": torch.rand(50, STATE)} for _ in range(2))  # fmt: skip
            more = {"action": torch.rand(50, CHUNK, ACTION), "reward": torch.rand(50), "done": torch.zeros(50).bool()}
            buffer.extend(TensorDict({"observation": seen, "next": after, **more}, batch_size=[50]))
        yield measured("torchrl_memmap", buffer.sample, floor, rounds)
        del buffer, storage
        gc.collect()
