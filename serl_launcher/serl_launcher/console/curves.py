"""Lines of the page's charts: rates over the last WINDOW online episodes with their interval, and the losses.

Pure functions of what `feed` has read. Every line has at most POINTS points.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serl_launcher.telemetry.statistics import sliding, wilson

WINDOW = 40  # as the status document's rates
POINTS = 240


def of_episodes(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """`success` [[ordinal, rate, low, high]], `help` [[ordinal, share of helped episodes]], `return` [[ordinal, mean]].

    Of whole online episodes; a success is one without help, as everywhere (Wilson's 95% interval).
    """
    online = [row for row in rows if row["mode"] == "online" and row["whole"]]
    wins = sliding([row["ok"] and not row["help"] for row in online], WINDOW)
    helped = sliding([row["help"] > 0 for row in online], WINDOW)
    returns, means = [row["ret"] for row in online], []
    for end, (_, n) in enumerate(wins, start=1):
        means.append(sum(returns[end - n : end]) / n)
    at = [row["n"] for row in online]
    return {
        "success": thinned([[x, k / n, *wilson(k, n)] for x, (k, n) in zip(at, wins, strict=True)]),
        "help": thinned([[x, k / n] for x, (k, n) in zip(at, helped, strict=True)]),
        "return": thinned([[x, mean] for x, mean in zip(at, means, strict=True)]),
    }


def of_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """`losses/*` -> [[step, value]]."""
    lines: dict[str, list[list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("losses/") and isinstance(value, int | float):
                lines.setdefault(key, []).append([row["step"], value])
    return {key: thinned(line) for key, line in lines.items()}


def thinned(line: list[list[float]]) -> list[list[float]]:
    """Every k-th point, the last among them, so that no more than POINTS are left; four digits of each."""
    every = -(-len(line) // POINTS) or 1
    return [[float(f"{value:.4g}") if i else value for i, value in enumerate(point)] for point in line[::-1][::every]][
        ::-1
    ]
