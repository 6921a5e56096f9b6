"""The replay as the trainer sees it: attached to the gateway's ring, asked for readiness, sampled."""

import numpy as np

from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.ring import RingError, RingReader
from serl_launcher.replay.verdicts import VerdictLedger
from serl_launcher.replay.views import ChunkBatch, View


class TrainingData:
    """One view of the replay.

    verdicts: which episodes the view accepted. rng: draws the batches. min_accepted: online episodes that must be
    accepted before an online stage trains.
    """

    def __init__(self, view: View, verdicts: VerdictLedger, rng: np.random.Generator, min_accepted: int) -> None:
        self._view, self._verdicts, self._rng, self.min_accepted = view, verdicts, rng, min_accepted
        self._ring: str | None = None

    @property
    def accepted(self) -> int:
        """Episodes that are imitated, over the whole run."""
        return self._verdicts.accepted

    def start_over(self) -> None:
        """People said something of episodes: the next `refresh` builds the view anew over the ring."""
        self._ring = None

    def take(self, view: View, verdicts: VerdictLedger) -> None:
        """Another rule's view from now on."""
        self._view, self._verdicts = view, verdicts
        self.start_over()

    def refresh(self, ring: str | None) -> bool:
        """Take in what came since the last call; False while there is no ring. ring: path that the status names.

        OSError when the verdicts on it cannot be written yet.
        """
        if ring and ring != self._ring:
            try:
                self._view.attach(RingReader(ring))
            except RingError:  # replaced between the status and now; the next status names the new one
                return False
            self._ring = ring
        if self._ring is None:
            return False
        self._view.refresh()
        self._verdicts.write()
        return True

    def problem(self, mode: str) -> str | None:
        return self._view.problem(mode, self.min_accepted)

    def ready(self, mode: str) -> bool:
        return self._view.ready(mode, self.min_accepted)

    def sample(self, size: int) -> ChunkBatch | LearningBatch:
        return self._view.sample(self._rng, size)

    def metrics(self) -> dict[str, float]:
        return self._view.counts()
