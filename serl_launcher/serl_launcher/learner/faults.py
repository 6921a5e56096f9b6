"""What the trainer does when a step is refused: skip its batch, go back to the last checkpoint, or hold.

The trainer reports each step to `Faults` once its metrics are read back, which comes before anything is published or
saved. Whatever happens, the policy server goes on with the last version that was published: nothing of a refused step
is kept, and a bad step is never published.
"""

import logging
import time

from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.together import Together

log = logging.getLogger("trainer")
SKIP, GO_BACK, HOLD = "skip", "go back", "hold"
REMIND_S = 30.0


class FaultBudget:
    """Counts refused steps: `patience` in a row are skipped (a bad batch), then the last checkpoint is taken; after
    `returns` such returns training holds."""

    def __init__(self, patience: int = 5, returns: int = 3) -> None:
        self._patience, self._returns = patience, returns
        self._in_a_row = self._taken_back = 0

    def good(self) -> None:
        self._in_a_row = 0

    def after(self, can_go_back: bool) -> str:
        """What to do after a refused step."""
        self._in_a_row += 1
        if self._in_a_row < self._patience:
            return SKIP
        self._in_a_row = 0
        self._taken_back += 1
        return GO_BACK if can_go_back and self._taken_back <= self._returns else HOLD


class Faults:
    """Decides about refused steps, and says so."""

    def __init__(self, checkpoints: TrainerCheckpoints, publisher: Publisher, together: Together) -> None:
        self._checkpoints, self._publisher, self._together = checkpoints, publisher, together
        self._budget = FaultBudget()
        self.held: str | None = None  # why no more steps are taken

    def taken(self) -> None:
        """A step was taken."""
        self._budget.good()

    def refused(self, fault: FloatingPointError) -> str:
        """The device refused a step; returns what was decided, SKIP, GO_BACK or HOLD."""
        last = self._checkpoints.last_own()
        decision = self._budget.after(can_go_back=last is not None)
        log.error("%s (%s; policy version %d goes on being served)", fault, decision, self._publisher.version)
        if decision == GO_BACK and last is not None:
            self._together.go_back_to(last)
            log.error("training goes on from checkpoint %s", last.name)
        elif decision == HOLD:
            self.held = f"training holds: {fault}"
        return decision

    def metrics(self) -> dict[str, float]:
        return {"trainer/held": 1.0} if self.held else {}


class Reminder:
    """Says a problem now, and what stands then again every 30 s."""

    def __init__(self) -> None:
        self._next = 0.0

    def say(self, problem: str) -> None:
        """One warning, unless the last one was a moment ago."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REMIND_S
            log.warning("%s", problem)
