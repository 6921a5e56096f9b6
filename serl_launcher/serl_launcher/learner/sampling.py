"""Which samples a fine-tuning batch holds, and the loader that reads them ahead. Called by learner.fine_tuning.

    (seed, number of the batch) ─▶ rows ─▶ [worker processes: read, decode, collate] ─▶ ChunkBatch, in order
                                                    pictures in shared memory, the rest through a pipe

Nothing here has a state: batch k is the same whether the run came to it in one go or was resumed at it, however many
workers there are. `seed_noise` does the same for what the loss draws.
"""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from serl_config.process import die_with_parent
from serl_launcher.learner.sft import Chunks
from serl_launcher.replay.views import ChunkBatch

PREFETCH = 4  # batches that each worker has ready
MOST_WORKERS = 8  # of `auto`
SHARED_BYTES, SHARED = 1 << 16, "/dev/shm"  # arrays that are smaller go through the pipe
ROOM = 16  # times a batch's pictures: what is free there, so that all workers may hand one over at once

log = logging.getLogger("trainer")


class ShuffledRows(Sampler[list[int]]):
    """Batches of rows: each epoch in an order of its own, its last, smaller batch dropped.

    rows: int64[n], those that train; first, last: numbers of the batches, half-open. Raises ValueError when the rows do
    not fill one batch.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, first: int, last: int) -> None:
        if len(rows) < batch_size:
            raise ValueError(f"dataset: {len(rows)} samples do not fill a batch of {batch_size}")
        self._rows, self._batch_size, self._seed, self._first, self._last = rows, batch_size, seed, first, last

    def __iter__(self) -> Iterator[list[int]]:
        a_epoch, drawn = len(self._rows) // self._batch_size, -1
        order = self._rows
        for number in range(self._first, self._last):
            epoch, place = divmod(number, a_epoch)
            if epoch != drawn:
                order, drawn = np.random.default_rng((self._seed, epoch)).permutation(self._rows), epoch
            yield order[place * self._batch_size : (place + 1) * self._batch_size].tolist()

    def __len__(self) -> int:
        return self._last - self._first


def seed_noise(seed: int, step: int) -> None:
    """What the loss of this step draws (noise, flow times, dropout), on every device."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1))


def worker_count(asked: int | str) -> int:
    """Loader processes: a number, or `auto`: the cores that this process may use less its own, at most MOST_WORKERS."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1) if asked == "auto" else int(asked)


def batches(chunks: Chunks, rows: ShuffledRows, workers: int) -> Iterator[ChunkBatch]:
    """The batches in order. Raises OSError in the user's words when a worker was killed; what a worker raises is
    raised here."""
    loader = DataLoader(
        chunks,
        batch_sampler=rows,
        collate_fn=partial(_handed_over, chunks.collate) if workers else chunks.collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=partial(_in_worker, os.getpid()),
    )
    source = iter(loader)
    while True:
        try:
            batch = next(source)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "Caught" in str(error):
                raise
            told = f"a process that reads the dataset was killed ({error}); with sft.workers=0 there is none"
            raise OSError(told) from None
        yield _changed(batch, torch.Tensor, torch.Tensor.numpy)


def _handed_over(collate: Callable[[list[Any]], Any], rows: list[Any]) -> Any:
    """In a worker. Pictures become tensors: torch hands those over in shared memory, where an array would be written
    into a pipe and read out of it between two steps: 15 MB for 8 samples of two 480 × 640 cameras."""
    batch = collate(rows)
    if isinstance(batch, ChunkBatch) and not _has_room(sum(x.nbytes for x in batch.images.values())):
        return batch
    return _changed(batch, np.ndarray, lambda x: torch.from_numpy(x) if x.nbytes >= SHARED_BYTES else x)


def _has_room(nbytes: int) -> bool:
    """In shared memory, for batches of so many bytes; said when it has not: a container may have 64 MB."""
    if shutil.disk_usage(SHARED).free >= ROOM * nbytes:
        return True
    least = f"{SHARED} has less than {ROOM * nbytes >> 20} MB free"
    _say_once(f"{least}: pictures go through pipes, which is slower (docker: --shm-size)")
    return False


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


def _changed(batch: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The batch with each value of a kind changed; anything but a ChunkBatch has none."""
    if not isinstance(batch, ChunkBatch):
        return batch
    images = {camera: change(x) if isinstance(x, kind) else x for camera, x in batch.images.items()}
    return replace(batch, images=images)


def _in_worker(trainer: int, _number: int) -> None:
    """A signal to the whole group is the trainer's, which takes its last step and ends the workers itself. One that is
    killed cannot: a worker that waits for room in the pipe would wait for ever."""
    die_with_parent(trainer)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
