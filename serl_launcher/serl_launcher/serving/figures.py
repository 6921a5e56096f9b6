"""What the policy server says about itself: sizes of batches, waiting times, refusals. Shown in the status document."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

_WINDOW = 500


class ServingFigures:
    """Counts since the start, and the last answers."""

    def __init__(self) -> None:
        self.requests = 0
        self.swaps = 0
        self.refused: Counter[str] = Counter()  # by error code
        self._batches: deque[int] = deque(maxlen=_WINDOW)
        self._latencies: deque[float] = deque(maxlen=_WINDOW)

    def answered(self, batch: int, latencies_ms: Sequence[float]) -> None:
        """A batch went out; latencies from arrival at the gateway to the answer."""
        self.requests += batch
        self._batches.append(batch)
        self._latencies.extend(latencies_ms)

    def to_body(self, waiting: int) -> dict[str, float | None]:
        """The report: plain numbers, None where there is nothing to say yet."""
        p50, p99 = np.percentile(self._latencies, (50, 99)).tolist() if self._latencies else (None, None)
        return {
            "requests": self.requests,
            "batch_mean": float(np.mean(self._batches)) if self._batches else 0.0,
            "p50_ms": p50,
            "p99_ms": p99,
            "waiting": waiting,
            "swaps": self.swaps,
            "deadline_missed": self.refused["deadline_missed"],
            "failed": self.refused["internal"],
        }
