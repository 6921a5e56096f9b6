"""The control loop's clock: it never ticks early, and a late tick is counted, not made up for."""

import time

import pytest

from serl_robot_infra.pacing import Pace


def test_ticks_are_at_least_a_period_apart():
    pace = Pace(100.0)
    pace.start()
    start = time.monotonic()
    for _ in range(10):
        pace.wait()
    assert time.monotonic() - start >= 0.099


def test_a_late_tick_is_an_overrun_and_moves_the_clock():
    pace = Pace(100.0)
    pace.start()
    time.sleep(0.05)
    pace.wait()
    assert pace.overruns == 1
    start = time.monotonic()
    pace.wait()
    assert time.monotonic() - start >= 0.009  # no burst to catch up


def test_zero_does_not_wait_and_negative_is_refused():
    pace = Pace(0)
    pace.start()
    time.sleep(0.01)
    pace.wait()
    assert pace.overruns == 0
    with pytest.raises(ValueError, match="rate_hz: expected 0 or more, got -1"):
        Pace(-1)
