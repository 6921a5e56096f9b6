"""Supervised fine-tuning on a LeRobot dataset, without actors: one stage of `sft.steps` steps that may be cut anywhere.

examples/train_sft.py builds it. The agent, its loss, the learner, checkpoints, versions and metrics are those of the
online runs; only where batches come from differs.

    sampling.batches ─▶ learner.step ─▶ held-out episodes, log row, version and checkpoint when due ─▶ …
         SIGINT, SIGTERM ─▶ stop ─▶ the step in hand, a version and a checkpoint; the same command goes on
         kill -9 ─▶ the same command goes on from the last checkpoint, with the steps that would have come
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.learner.ahead import Ahead
from serl_launcher.learner.augment import Augment
from serl_launcher.learner.disk import DiskWait
from serl_launcher.learner.held_out import HeldOut
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.overfit import Overfit
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.sampling import ShuffledRows, batches, seed_noise, worker_count
from serl_launcher.learner.sft import Chunks
from serl_launcher.learner.stage import StageProgress, TrainingStage
from serl_launcher.learner.step_log import StepLog
from serl_launcher.replay.views import ChunkBatch
from serl_launcher.run.files import read_sealed, write_sealed
from serl_launcher.run.versions import highest_number

log = logging.getLogger("trainer")
STAGE = "sft"
PATIENCE = 5  # steps in a row that are refused before training ends


@dataclass(frozen=True, slots=True)
class SftSettings:
    """Keys of `sft`; config/sft/default.yaml says what they mean. ValueError names the key that is out of range."""

    steps: int
    batch_size: int
    accumulate: int
    lr: float
    warmup: float
    max_samples: int | None
    overfit: int | None
    workers: int | str
    held_out: float
    eval_period: int
    eval_samples: int
    save_period: int
    log_period: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value != {"max_samples": None, "overfit": None, "workers": "auto"}.get(field.name, math.nan):
                _check(field.name, value)
        if self.overfit and self.max_samples:
            raise ValueError("sft.overfit takes whole episodes: expected no sft.max_samples beside it")

    @property
    def stage(self) -> TrainingStage:
        return TrainingStage(STAGE, "train", self.steps)


def _check(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in ("lr", "warmup", "held_out"):
        top = math.inf if name == "lr" else 1
        good, expected = number and 0 <= value < top, "a number of at least 0" + (" below 1" if top == 1 else "")
    else:
        least = 0 if name == "workers" else 1
        good, expected = number and isinstance(value, int) and value >= least, f"a whole number of at least {least}"
    if not good:
        other = {"max_samples": ", or null", "overfit": ", or null", "workers": ", or auto"}.get(name, "")
        raise ValueError(f"sft.{name}: expected {expected}{other}, got {value!r}")


class Best:
    """The parameters with the lowest held-out loss, kept in a folder beside `params/` that is read like it."""

    def __init__(self, folder: Path, learner: Learner, publisher: Publisher) -> None:
        self._folder, self._file, self._learner = folder, folder / "best.json", learner
        self._publisher = publisher
        told = read_sealed(self._file, ("step", "loss"), ("step", "loss"))
        self.step, self.loss = (told["step"], told["loss"]) if told else (0, math.inf)

    def offer(self, step: int, loss: float) -> None:
        """Keep these parameters if their loss is the lowest so far. OSError when the disk refuses."""
        if loss >= self.loss or not math.isfinite(loss):
            return
        self._publisher.publish_into(self._folder, highest_number(self._folder) + 1, keep=1)
        write_sealed(self._file, {"step": step, "loss": loss})
        self.step, self.loss = step, loss


class FineTuning:
    """One run of fine-tuning, from wherever its checkpoints have come to.

    rows: int64[n], the samples that train; seed: of their order and of the noise.
    """

    def __init__(
        self,
        learner: Learner,
        chunks: Chunks,
        rows: np.ndarray,
        held_out: HeldOut,
        progress: StageProgress,
        publisher: Publisher,
        checkpoints: TrainerCheckpoints,
        best: Best,
        step_log: StepLog,
        settings: SftSettings,
        *,
        seed: int,
        overfit: Overfit | None = None,
        augment: Augment | None = None,
    ) -> None:
        self._learner, self._held_out, self._progress = learner, held_out, progress
        self._publisher, self._checkpoints, self.best, self._step_log = publisher, checkpoints, best, step_log
        self._settings, self._stage, self._seed = settings, settings.stage, seed
        self._disk = DiskWait(lambda: "")
        self.overfit = overfit  # asks of the measured episodes, which train in that case, whether they are learned
        self._refused = 0  # steps in a row
        self._stopping = False
        first = self.taken * settings.accumulate
        order = ShuffledRows(rows, settings.batch_size, seed, first, settings.steps * settings.accumulate)
        self._augment, self._first = augment, first
        self._batches = partial(batches, chunks, order, worker_count(settings.workers))

    @property
    def taken(self) -> int:
        """Steps so far; a refused one counts, since its batches are passed over."""
        return self._progress.taken(self._stage)

    @property
    def finished(self) -> bool:
        return self._progress.finished(self._stage) or (self.overfit is not None and self.overfit.passed)

    def stop(self) -> None:
        """End after the step in hand; from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Steps until the last one, or until `stop`; whatever is due is on disk when this returns.

        FloatingPointError after PATIENCE refused steps in a row, OSError when a loader's process was killed,
        RuntimeError when frozen parameters have changed.
        """
        if self.overfit and self.taken:  # it may be learned already
            self._judge(self._held_out.measure(self._learner))
        with closing(self._batches()) as source:  # its processes end here: at an exit they would be waited for
            part = partial(self._prepared, enumerate(source, self._first))
            with closing(Ahead(part, self._learner.device)) as ahead:
                while not self.finished and not self._stopping:
                    self._turn(ahead)
        if self._stopping and not self.finished:
            self._write([self._publisher.publish, self._checkpoints.save])
        self._step_log.close()
        self._publisher.check_frozen()

    def _prepared(self, source: Iterator[tuple[int, ChunkBatch]]) -> list[ChunkBatch]:
        """The batches of a step, of (number, batch) one after another."""
        return [self._learner.prepare(self._changed(*next(source))) for _ in range(self._settings.accumulate)]

    def _changed(self, number: int, batch: ChunkBatch) -> ChunkBatch:
        """With its pictures as this batch has them, however often training was cut before."""
        if self._augment is None:
            return batch
        return self._augment(batch, np.random.default_rng((self._seed, number)), self._learner.device)

    def _turn(self, ahead: Ahead) -> None:
        began = time.perf_counter()
        parts = ahead.take()
        if self.taken + 1 < self._settings.steps:
            ahead.begin()
        sampled = time.perf_counter()
        seed_noise(self._seed, self.taken)
        metrics = self._learner.step(parts, self._progress.lr_scale(self._stage))
        self._progress.count(self._stage)
        metrics |= {"time/sample_s": sampled - began, "time/step_s": time.perf_counter() - sampled}
        measured = self._measured(ahead) if self._due(self._settings.eval_period) else {}
        logged = self._step_log.add(self.taken, STAGE, metrics, measured)
        if not (logged or self._due(self._settings.save_period)):
            return
        self._settle()
        due = [*(self._judge(measured) if measured else []), self._step_log.write]
        due += [self._publisher.publish, self._checkpoints.save] if self._due(self._settings.save_period) else []
        self._write(due)
        if logged:
            log.info("%s", self._line())

    def _measured(self, ahead: Ahead) -> dict[str, float]:
        ahead.wait()  # it reads the same dataset with the same tokenizer
        return self._held_out.measure(self._learner)

    def _judge(self, measured: dict[str, float]) -> list[Callable[[], object]]:
        """Of the measured episodes: is this the best version, or are they learned by heart? What is to be written."""
        if self.overfit is None:
            return [partial(self.best.offer, self.taken, measured[self._held_out.loss])]
        self.overfit.judge(self.taken, measured[self._held_out.error])
        return []

    def _settle(self) -> None:
        """Learn which of the last steps the device refused. FloatingPointError after PATIENCE of them in a row."""
        for row in self._step_log.read():
            fault = self._learner.fault(row.step, row.metrics)
            self._refused = self._refused + 1 if fault else 0
            if fault:
                log.error("%s; its batch is passed over", fault)
            if fault and self._refused >= PATIENCE:
                raise fault

    def _due(self, period: int) -> bool:
        return self.finished or self.taken % period == 0

    def _write(self, due: list[Callable[[], object]]) -> None:
        """Do these writes; where the disk refuses one, wait for it, and say so."""
        while due or self._disk.behind:
            try:
                self._disk.write(due)
            except OSError as error:
                self._disk.refused(error)
            due = []
        self._disk.taken()

    def _line(self) -> str:
        shown = self._step_log.shown
        text = f"step {self.taken}/{self._settings.steps}  loss {shown.get('losses/flow', math.nan):.4f}"
        if self._held_out.loss not in shown:
            return text
        loss, error = shown[self._held_out.loss], shown[self._held_out.error]
        if self.overfit:
            return f"{text}  open-loop error {error:.4g} (asked: {self.overfit.bound:.4g})"
        text += f"  held out: loss {loss:.4f}, open-loop error {error:.4f}"
        return text + ("  best so far" if self.best.step == self.taken else f"  (best: {self.best.loss:.4f})")
