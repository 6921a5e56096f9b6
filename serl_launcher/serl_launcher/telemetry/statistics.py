"""Proportions and their uncertainty. Pure functions without torch, for the gateway, the dashboard and the summary."""

import math
from collections.abc import Sequence
from statistics import median

Z_95 = 1.959964  # two-sided 95%


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), sound for few trials; (0, 1) when there was none.

    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the extremes the bounds are exact, and rounding must not put them on the wrong side of p.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def sliding(outcomes: Sequence[bool], window: int) -> list[tuple[int, int]]:
    """(successes, trials) over the last `window` outcomes, at each outcome."""
    result, successes = [], 0
    for index, outcome in enumerate(outcomes):
        successes += outcome - (outcomes[index - window] if index >= window else 0)
        result.append((successes, min(index + 1, window)))
    return result


def speed(ticks: Sequence[int], success: Sequence[bool]) -> dict[str, float | None]:
    """How fast success comes: what a robot brings in 1,000 ticks, failures included, and the median success's ticks.

    ticks, success: of each episode.
    """
    good = [n for n, well in zip(ticks, success, strict=True) if well]
    return {
        "successes_per_1000_ticks": round(1000 * len(good) / sum(ticks), 2) if sum(ticks) else None,
        "median_ticks_to_success": median(good) if good else None,
    }
