"""The replay as the trainer sees it: attached to the gateway's ring, asked for readiness, sampled.

Each rank has a view of its own, over the rows of the ring that rank 0's has taken in: the same generator draws the same
rows of every batch on all of them, and each gathers its share. learner.together calls `refresh` on rank 0, `follow` on
the others and `meet` on all.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from serl_launcher.learner.ahead import Ahead
from serl_launcher.learner.augment import Augment
from serl_launcher.learner.ranks import Ranks
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.ring import RingError, RingReader
from serl_launcher.replay.verdicts import Verdict, VerdictLedger
from serl_launcher.replay.views import ChunkBatch, View

log = logging.getLogger("trainer")
MOST_STARTS = 5  # of views that came out of step, one behind the other
SHARED = ("drop_before", "fingerprint")


class TrainingData:
    """One view of the replay, and the next batch of it, made ahead.

    A step gets the batch that it would get if it were drawn then: one that is ahead is forgotten when the view changes,
    and the generator stands where the last batch that was taken left it, which is what a checkpoint keeps.

    verdicts: which episodes the view accepted. rng: draws the batches. min_accepted: online episodes that must be
    accepted before an online stage trains. prepare: of the learner, made on its device. augment: what changes the
    pictures before, None for nothing. ValueError: the view is of one rank only.
    """

    def __init__(
        self,
        view: View,
        verdicts: "VerdictLedger | Heard",
        rng: np.random.Generator,
        min_accepted: int,
        prepare: Callable[[Any], Any],
        device: torch.device,
        augment: Augment | None = None,
        ranks: Ranks | None = None,
        open_ring: Callable[[str], RingReader] = RingReader,
    ) -> None:
        self._view, self._verdicts, self._rng, self.min_accepted = view, verdicts, rng, min_accepted
        self._ranks, self._open_ring = ranks or Ranks.one(), open_ring
        self._ring: str | None = None
        self._reader: RingReader | None = None
        self._rows = -1  # of the ring that the view has
        self._starts = 0  # in a row, because ranks came out of step
        self._prepare, self._ahead = prepare, Ahead(self._draw, device)
        self._augment, self._device = augment, device
        if self._ranks.world > 1 and not all(hasattr(view, name) for name in SHARED):
            raise ValueError(
                f"algo.view: {type(view).__name__} has no {' and '.join(SHARED)}, which several ranks need"
            )

    @property
    def accepted(self) -> int:
        """Episodes that are imitated, over the whole run."""
        return self._verdicts.accepted

    def start_over(self) -> None:
        """People said something of episodes: the next `refresh` builds the view anew over the ring."""
        self._ahead.drop()
        self._ring = None

    def take(self, view: View, verdicts: "VerdictLedger | Heard") -> None:
        """Another rule's view from now on."""
        self.start_over()
        self._view, self._verdicts = view, verdicts

    def refresh(self, ring: str | None) -> bool:
        """Take in what came since the last call; False while there is no ring. ring: path that the status names."""
        self._ahead.wait()  # a draw reads the view
        if ring and ring != self._ring and not self._attach(ring):
            return False
        if self._ring is None:
            return False
        self._take_in(self._reader.rows)
        return True

    def _attach(self, ring: str) -> bool:
        self._ahead.drop()
        self._ring = None
        try:
            self._reader = self._open_ring(ring)
        except (RingError, FileNotFoundError):  # replaced between the status and now; the next status names the new one
            return False
        self._view.attach(self._reader)
        self._ring, self._rows = ring, -1
        return True

    def _take_in(self, rows: int) -> None:
        """All parts of the view see the ring up to the same row."""
        if rows != self._rows:
            self._reader.reach(rows)
            self._rows = rows
            self._ahead.drop()
            self._view.refresh()

    @property
    def reach(self) -> tuple[str | None, int]:
        """The ring, and the rows of its table that the view has taken in."""
        return self._ring, self._rows

    def judged(self) -> list[list[Any]]:
        """Of rank 0: what `follow` is told."""
        return self._verdicts.fresh()

    def follow(self, ring: str, rows: int, returns: list[list[Any]]) -> bool:
        """On another rank than 0: as far as rank 0 came. False where that ring is gone.

        returns: ordinal, mode and return of the episodes that rank 0 judged since the last time.
        """
        self._ahead.wait()
        self._verdicts.hear(returns)
        if ring != self._ring and not self._attach(ring):
            return False
        self._take_in(rows)
        return True

    def meet(self, came: bool) -> bool:
        """All ranks together, behind `refresh` or `follow`: do their views draw the same? What one of them has lost to
        the writer meanwhile, all forget. False: each starts over with the next reach. RuntimeError when that did not
        help."""
        ranks = self._ranks
        oldest = ranks.highest(self._reader.first_valid if came else 0)
        if came:
            self._view.drop_before(oldest)
        mine = self._view.fingerprint() if came else -1
        if not ranks.highest(int(mine != ranks.agree(mine) or not came)):
            self._starts = 0
            return True
        self._starts += 1
        if self._starts >= MOST_STARTS:
            raise RuntimeError(f"the ranks' views of the replay differ, {MOST_STARTS} times in a row")
        log.warning("the ranks' views of the replay differ: each is built anew")
        self.start_over()
        return False

    def write_verdicts(self) -> None:
        """OSError when they cannot be written yet."""
        self._verdicts.write()

    def problem(self, mode: str) -> str | None:
        return self._view.problem(mode, self.min_accepted)

    def ready(self, mode: str) -> bool:
        return self._view.ready(mode, self.min_accepted)

    def sample(self, size: int) -> ChunkBatch | LearningBatch:
        """This rank's share of a batch of `size` that the agent has prepared; the next one is begun."""
        batch, self._rng.bit_generator.state = self._ahead.take(size)
        self._ahead.begin(size)
        return batch

    def _draw(self, size: int) -> tuple[ChunkBatch | LearningBatch, Mapping[str, Any]]:
        """A batch, and where the generator stands after it."""
        rng = copy.deepcopy(self._rng)
        share = () if self._ranks.world == 1 else (self._ranks.share(size),)
        batch = self._view.sample(rng, size, *share)
        if self._augment is not None:
            batch = self._augment(batch, rng, self._device, self._ranks.share(size), size)
        return self._prepare(batch), rng.bit_generator.state

    def close(self) -> None:
        """No more batches."""
        self._ahead.close()

    def metrics(self) -> dict[str, float]:
        return self._view.counts()


class Heard:
    """Another rank's ledger of verdicts: rank 0 keeps them, and tells it the returns, which a threshold goes by."""

    def __init__(self) -> None:
        self._returns: dict[int, tuple[str, float]] = {}

    def hear(self, returns: Iterable[list[Any]]) -> None:
        """Ordinal, mode and return of episodes."""
        self._returns |= {ordinal: (mode, return_) for ordinal, mode, return_ in returns}

    def note(self, verdict: Verdict) -> None:
        """Rank 0 notes the same one."""

    def returns(self, after: int, before: int) -> list[tuple[str, float]]:
        """As of replay.verdicts."""
        return [self._returns[ordinal] for ordinal in range(after + 1, before) if ordinal in self._returns]
