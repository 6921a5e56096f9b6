"""Fine-tuning's loader against the same batches in memory: steps a second, for steps of several lengths.

What a GPU box's trainer does in a step is wait for the device, so a step here sleeps; `cpu` is a real one of the tiny
PI0, which takes a core itself. Sets: an SO-101's (two cameras of 480 × 640, video) and one of small pictures (PNG).
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from _seeded_sets import smooth
from accelerate import Accelerator
from rows import Row, alternate

from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.sampling import ShuffledRows, batches, worker_count
from serl_launcher.learner.sft import Chunks
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.tiny import TinySize
from serl_launcher.replay.views import ChunkBatch

SETS = {"so101_video": ((480, 640), True), "small_png": ((64, 64), False)}
AH, BATCH, MS = 16, 8, (10, 50, 100, 250, 500)
WARM = 6  # batches until what is prefetched is used up
Step = Callable[[ChunkBatch], object]


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    torch.set_num_threads(1)
    for name, (size, video) in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            data = Dataset(write(Path(folder) / "set", size, video))
            chunks = Chunks(data.rows(data.spec()), AH)
            steps: dict[str, Step] = {f"{ms}ms": partial(pause, ms / 1e3) for ms in MS}
            for step, work in (steps | {"cpu": cpu_step(chunks)}).items():
                yield compared(f"sft/{name}/batch_{BATCH}/step_{step}", chunks, work, quick)


def compared(name: str, chunks: Chunks, step: Step, quick: bool) -> Row:
    """Steps a second with the loader, and with batches that are there already."""
    order = ShuffledRows(np.arange(len(chunks)), BATCH, 0, 0, 10**6)
    kept = [chunks.collate([chunks[row] for row in some]) for some in islice(order, 8)]

    def rate(source: Iterator[ChunkBatch]) -> float:
        for batch in islice(source, WARM):
            step(batch)
        began, taken = time.perf_counter(), 0
        while taken < 10 or time.perf_counter() - began < (1 if quick else 8):
            step(next(source))
            taken += 1
        return taken / (time.perf_counter() - began)

    def loaded() -> float:
        with closing(batches(chunks, order, worker_count("auto"))) as source:
            return rate(source)

    found = alternate({"memory": lambda: rate(cycle(kept)), "loader": loaded}, 1 if quick else 3)
    return Row.of(name, found["loader"], "steps/s", found["memory"], ">= 0.95")


def pause(seconds: float, _batch: ChunkBatch) -> None:
    """The device works."""
    time.sleep(seconds)


def cpu_step(chunks: Chunks) -> Step:
    """A whole step of a tiny PI0."""
    policy = build_pi0("sft", chunks.spec, "random", 0, AH, TinySize())
    options = {"max_grad_norm": 1.0, "ema_decay": 0.99}
    learner = Learner(
        FlowMatchingAgent(policy, 1), partial(torch.optim.AdamW, lr=1e-4), Accelerator(cpu=True), **options
    )
    return lambda batch: learner.step(batch, 1.0)


def write(folder: Path, size: tuple[int, int], video: bool) -> Path:
    """By LeRobot itself: two episodes of 150 ticks, pictures of a textured ground on which a square moves."""
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "video" if video else "image", "shape": (*size, 3), "names": ["height", "width", "channels"]}
    cameras = [f"observation.images.{name}" for name in ("front", "wrist")]
    features = {key: image for key in cameras} | {
        key: {"dtype": "float32", "shape": (6,), "names": [f"j{k}" for k in range(6)]}
        for key in ("observation.state", "action")
    }
    dataset = LeRobotDataset.create("local/sft", fps=30, features=features, root=folder, use_videos=video)
    rng, (h, w) = np.random.default_rng(0), size
    ground = np.kron(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), np.ones((h // 16, w // 16, 1), np.uint8))
    for _ in range(2):
        path = smooth(rng, 150, 6, 0.4).astype(np.float32)
        for at in path:
            seen = ground + rng.integers(0, 12, ground.shape, dtype=np.uint8)
            y, x = (int((0.5 + at[k]) * 0.7 * size[k]) for k in (0, 1))
            seen[y : y + h // 8, x : x + w // 8] = (240, 60, 40)
            dataset.add_frame({"observation.state": at, "action": at, "task": "move"} | {key: seen for key in cameras})
        dataset.save_episode()
    dataset.finalize()
    return folder
