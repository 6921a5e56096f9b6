"""The overfit check: can a policy learn a few episodes by heart? learner.fine_tuning asks under `sft.overfit`.

    open-loop error on the episodes that train ─▶ judge ─▶ passed, once it is SMALL against doing nothing; else training
    goes on to its last step, and the check is failed

A policy that fails it needs more steps, or has what more data do not mend: wrong units, dims or cameras exchanged,
actions that do not follow from what is seen.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from serl_launcher.datasets.dataset import Rows

SMALL = 0.1  # of the better baseline's squared error


def baselines(
    rows: Rows,
    chosen: Sequence[int],
    ticks: int,
    scale: np.ndarray,
    still: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, float]:
    """Mean squared errors, in the model's units, of holding still and of repeating the last action for `ticks` ticks.

    chosen: the rows at which they begin; scale: float[ad], physical per model unit; still: as open_loop.hold_still
    makes it.
    """
    errors: dict[str, list[float]] = {"hold still": [], "repeat the last action": []}
    for row in chosen:
        last = rows.action[row - 1] if row > rows.episode(row).first else np.zeros_like(rows.action[row])
        recorded, is_pad = rows.chunk(row, ticks)
        for name, action in zip(errors, (still(rows.state[row], last), last), strict=True):
            errors[name].append(float(np.square((action - recorded[~is_pad]) / scale).mean()))
    return {name: float(np.mean(found)) for name, found in errors.items()}


class Overfit:
    """The check of one run. against: baseline -> its error on the same samples.

    Raises ValueError where a baseline makes no error: nothing moves in those episodes, or every action is the one
    before, so that the check would say nothing.
    """

    def __init__(self, against: Mapping[str, float]) -> None:
        self._against = dict(against)
        self.bound = SMALL * min(against.values())  # of the open-loop error
        self.passed, self._step, self._error = False, 0, float("nan")
        if not self.bound > 0:
            still = min(against, key=lambda name: against[name])
            raise ValueError(f"sft.overfit: to {still} makes no error in these episodes: choose some in which it moves")

    def judge(self, step: int, error: float) -> None:
        """The open-loop error after so many steps."""
        self._step, self._error = step, error
        self.passed = error <= self.bound

    def __str__(self) -> str:
        share = self._error / min(self._against.values())
        others = ", ".join(f"{name} {error:.4g}" for name, error in self._against.items())
        return (
            f"overfit check {'passed' if self.passed else 'NOT passed'} at step {self._step}: open-loop error "
            f"{self._error:.4g}, {share:.0%} of the better baseline's ({others}; at most {SMALL:.0%} is asked)"
        )
