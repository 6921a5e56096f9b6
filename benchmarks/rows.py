"""One figure of a benchmark beside the machine's own floor, and the A B A B measuring that both come from."""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """What `run.py` prints as one JSON line."""

    name: str  # suite/what/parameters
    value: float | None  # median; None: it failed, and `unit` says how
    unit: str  # items/s (more is better) or s, ms (less is better)
    floor: float | None  # the same work by the barest means, measured in the same run; None: a floor itself
    ratio: float | None  # value / floor
    goal: str | None  # such as ">= 0.8", of the ratio, or without a floor of the value; None: no goal is set
    holds: bool | None  # it meets the goal

    @classmethod
    def of(cls, name: str, value: float, unit: str, floor: float | None = None, goal: str | None = None) -> "Row":
        """Work out ratio and verdict; `goal` is '>= x' or '<= x' of the ratio, or of the value without a floor."""
        ratio = None if floor is None else value / floor
        holds = None if goal is None else meets(value if ratio is None else ratio, goal)
        return cls(name, rounded(value), unit, rounded(floor), rounded(ratio), goal, holds)

    @classmethod
    def failed(cls, name: str, why: str) -> "Row":
        """What could not be measured, with the reason in place of the unit."""
        return cls(name, None, why, None, None, None, None)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def meets(ratio: float, goal: str) -> bool:
    """Whether `ratio` satisfies '>= x' or '<= x'."""
    sign, bound = goal.split()
    return ratio >= float(bound) if sign == ">=" else ratio <= float(bound)


def rounded(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def alternate(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Run every measurement `rounds` times in turn (A B A B): a drift of the machine hits all alike. Medians."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, measure in work.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}
