"""Times of day that can be subtracted: the wall clock of this process's start, carried on by the monotonic clock.

A wall clock that is set while a process runs (NTP, a person) then changes neither an order nor a duration within it.
"""

import time

_WALL_NS, _MONOTONIC_NS = time.time_ns(), time.monotonic_ns()


def steady_time_ns() -> int:
    """Unix time in ns."""
    return _WALL_NS + time.monotonic_ns() - _MONOTONIC_NS


def steady_time() -> float:
    """Unix time in s."""
    return steady_time_ns() / 1e9
