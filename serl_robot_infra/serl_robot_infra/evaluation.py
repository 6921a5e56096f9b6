"""Success rates with their uncertainty, and how long a success takes, per stage. Filled by the actor loop, printed at
its end; trial by trial it is in evaluation.csv (observers/trials.py).
"""

import math
from collections import Counter, defaultdict
from statistics import median

from serl_robot_infra.observers.base import EpisodeReport


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate; (0, 1) without data. z=1.96: 95%."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


class EvaluationSummary:
    """Counts finished evaluation episodes; an episode that was cut says nothing about the policy and is left out."""

    def __init__(self) -> None:
        self._episodes: Counter[str] = Counter()
        self._ticks: Counter[str] = Counter()
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)  # of each success

    def add(self, report: EpisodeReport) -> None:
        """Count an episode, if it is an evaluation that ran to its end."""
        if report.info.mode == "eval" and report.outcome.truncated_by in (None, "time_limit"):
            self._episodes[report.info.stage] += 1
            self._ticks[report.info.stage] += report.ticks
            if report.outcome.success:
                self._seconds[report.info.stage].append(report.driven_s)

    def lines(self) -> list[str]:
        """`evaluation after: 55/60 = 0.92 [0.82, 0.96], median 4.2 s to success, 21.3 per 1,000 ticks`, one line per
        stage."""
        lines = []
        for stage, n in self._episodes.items():
            seconds = self._seconds[stage]
            low, high = wilson(len(seconds), n)
            line = f"evaluation {stage}: {len(seconds)}/{n} = {len(seconds) / n:.2f} [{low:.2f}, {high:.2f}]"
            pace = 1000 * len(seconds) / max(1, self._ticks[stage])
            fast = f", median {median(seconds):.1f} s to success, {pace:.1f} per 1,000 ticks" if seconds else ""
            lines.append(line + fast)
        return lines
