"""The replay as the trainer sees it: attached to the gateway's ring, asked for readiness, sampled."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from serl_launcher.learner.ahead import Ahead
from serl_launcher.learner.augment import Augment
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.ring import RingError, RingReader
from serl_launcher.replay.verdicts import VerdictLedger
from serl_launcher.replay.views import ChunkBatch, View


class TrainingData:
    """One view of the replay, and the next batch of it, made ahead.

    A step gets the batch that it would get if it were drawn then: one that is ahead is forgotten when the view changes,
    and the generator stands where the last batch that was taken left it, which is what a checkpoint keeps.

    verdicts: which episodes the view accepted. rng: draws the batches. min_accepted: online episodes that must be
    accepted before an online stage trains. prepare: of the learner, made on its device. augment: what changes the
    pictures before, None for nothing.
    """

    def __init__(
        self,
        view: View,
        verdicts: VerdictLedger,
        rng: np.random.Generator,
        min_accepted: int,
        prepare: Callable[[Any], Any],
        device: torch.device,
        augment: Augment | None = None,
    ) -> None:
        self._view, self._verdicts, self._rng, self.min_accepted = view, verdicts, rng, min_accepted
        self._ring: str | None = None
        self._prepare, self._ahead = prepare, Ahead(self._draw, device)
        self._augment, self._device = augment, device

    @property
    def accepted(self) -> int:
        """Episodes that are imitated, over the whole run."""
        return self._verdicts.accepted

    def start_over(self) -> None:
        """People said something of episodes: the next `refresh` builds the view anew over the ring."""
        self._ahead.drop()
        self._ring = None

    def take(self, view: View, verdicts: VerdictLedger) -> None:
        """Another rule's view from now on."""
        self.start_over()
        self._view, self._verdicts = view, verdicts

    def refresh(self, ring: str | None) -> bool:
        """Take in what came since the last call; False while there is no ring. ring: path that the status names.

        OSError when the verdicts on it cannot be written yet.
        """
        self._ahead.wait()  # a draw may find that what it wants is overwritten, and forget it
        if ring and ring != self._ring:
            self._ahead.drop()
            try:
                self._view.attach(RingReader(ring))
            except RingError:  # replaced between the status and now; the next status names the new one
                return False
            self._ring = ring
        if self._ring is None:
            return False
        if self._view.refresh():
            self._ahead.drop()
        self._verdicts.write()
        return True

    def problem(self, mode: str) -> str | None:
        return self._view.problem(mode, self.min_accepted)

    def ready(self, mode: str) -> bool:
        return self._view.ready(mode, self.min_accepted)

    def sample(self, size: int) -> ChunkBatch | LearningBatch:
        """A batch that the agent has prepared; the next one is begun."""
        batch, self._rng.bit_generator.state = self._ahead.take(size)
        self._ahead.begin(size)
        return batch

    def _draw(self, size: int) -> tuple[ChunkBatch | LearningBatch, Mapping[str, Any]]:
        """A batch, and where the generator stands after it."""
        rng = copy.deepcopy(self._rng)
        batch = self._view.sample(rng, size)
        if self._augment is not None:
            batch = self._augment(batch, rng, self._device)
        return self._prepare(batch), rng.bit_generator.state

    def close(self) -> None:
        """No more batches."""
        self._ahead.close()

    def metrics(self) -> dict[str, float]:
        return self._view.counts()
