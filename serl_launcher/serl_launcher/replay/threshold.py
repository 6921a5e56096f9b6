"""The return threshold m of rejection sampling as a function of the episodes so far; it never falls.

The chunk view (replay.views) shows it every finished episode in ordinal order, those that have left the ring from the
acceptance ledger, so that replaying a run gives the same thresholds again. yaml names one (`algo.threshold`); without
one the rule's own `min_return` holds for ever.
"""

from collections import deque
from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Threshold(Protocol):
    """m, non-decreasing."""

    @property
    def value(self) -> float: ...  # m for the next episode

    def observe(self, mode: str, return_: float) -> None: ...  # an episode is over, accepted or not

    def reset(self) -> None: ...  # forget every episode


class SteppedThreshold:
    """m by the number of online episodes seen: {0: 0.5, 200: 0.8} asks for 0.8 from the 200th on."""

    def __init__(self, values: Mapping[int, float]) -> None:
        self._steps = sorted((int(n), float(m)) for n, m in values.items())
        thresholds = [m for _, m in self._steps]
        if not self._steps or self._steps[0][0] != 0 or thresholds != sorted(thresholds):
            raise ValueError(f"algo.threshold.values: expected {{0: m, n: m', …}} with m ≤ m', got {dict(values)}")
        self.reset()

    def __str__(self) -> str:
        return f"SteppedThreshold({dict(self._steps)})"

    @property
    def value(self) -> float:
        return [m for n, m in self._steps if n <= self._online][-1]

    def observe(self, mode: str, return_: float) -> None:
        self._online += mode == "online"

    def reset(self) -> None:
        self._online = 0


class QuantileThreshold:
    """m rises to a quantile of the last `window` online returns, from `start`, never above `ceiling`."""

    def __init__(self, start: float, quantile: float = 0.5, window: int = 50, ceiling: float = float("inf")) -> None:
        if not 0 <= quantile <= 1 or window < 1 or ceiling < start:
            raise ValueError(
                "algo.threshold: expected 0 ≤ quantile ≤ 1, window ≥ 1 and ceiling ≥ start, "
                f"got {quantile}, {window}, {ceiling} and {start}"
            )
        self._start, self._quantile, self._ceiling = start, quantile, ceiling
        self._returns: deque[float] = deque(maxlen=window)
        self.reset()

    def __str__(self) -> str:
        window = self._returns.maxlen
        return f"QuantileThreshold(start={self._start}, quantile={self._quantile}, {window=}, ceiling={self._ceiling})"

    @property
    def value(self) -> float:
        return self._m

    def observe(self, mode: str, return_: float) -> None:
        if mode != "online":
            return
        self._returns.append(return_)
        if len(self._returns) == self._returns.maxlen:
            # "lower": m is a return that was reached, so that one-valued returns never lock everything out.
            reached = float(np.quantile(self._returns, self._quantile, method="lower"))
            self._m = max(self._m, min(reached, self._ceiling))

    def reset(self) -> None:
        self._returns.clear()
        self._m = self._start
