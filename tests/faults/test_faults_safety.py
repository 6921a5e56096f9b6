"""A real actor with a robot: e-stop by key, signal and file, and a learner that is stopped under it."""

from __future__ import annotations

import signal
import time

import pytest
from robot_rig import PERIOD_S, RobotRig

LATCHED_S = 1.0
STOP_MS = 500


@pytest.fixture
def robot(tmp_path):
    with RobotRig(tmp_path) as rig:
        yield rig


def test_every_way_to_press_the_estop_acts_within_one_period(robot, figures):
    robot.start_actor()
    ways = {
        "key": lambda: robot.press(b" "),
        "signal": lambda: robot.actor.send_signal(signal.SIGUSR1),
        "file": lambda: robot.latch.touch(),
    }
    stops: dict[str, float] = {}
    actions: dict[str, int] = {}
    for way, press in [*ways.items()] * 2:
        robot.wait_moving()
        pressed = time.monotonic()
        press()
        robot.wait(lambda at=pressed: robot.of("s", at), "the robot is stopped")
        time.sleep(LATCHED_S)
        late = robot.of("s", pressed)[0] - pressed
        stops[way] = max(stops.get(way, 0.0), late / PERIOD_S)
        actions[way] = actions.get(way, 0) + sum(at - pressed > PERIOD_S for at in robot.of("a", pressed))
        assert robot.of("r", pressed) == [], "it moved while it was latched"
        robot.latch.unlink()
    figures.row(
        "estop", "stopped within one period, latched", max(stops.values()) <= 1 and not any(actions.values()),
        stop_periods={way: round(late, 2) for way, late in stops.items()}, actions_later=sum(actions.values()),
        moved_while_latched=0, period_ms=PERIOD_S * 1e3,
    )  # fmt: skip
    assert max(stops.values()) <= 1, stops
    assert not any(actions.values()), actions


def test_a_stopped_learner_trips_the_watchdog_within_two_periods_of_its_timeout(robot, figures):
    robot.start_actor(stop_ms=STOP_MS)
    late = []
    for _ in range(3):
        robot.wait_moving()
        robot.learner.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        robot.wait(lambda at=stopped: robot.of("s", at), "the robot is stopped")
        at = robot.of("s", stopped)[0]
        last_action = max(a for a in robot.of("a") if a < at)
        late.append((at - last_action - STOP_MS / 1e3) / PERIOD_S)
        robot.learner.send_signal(signal.SIGCONT)
    figures.row(
        "watchdog", "stopped within two periods of its timeout", max(late) <= 2,
        late_periods_max=round(max(late), 2), held_before=len(robot.of("h")), timeout_ms=STOP_MS,
    )  # fmt: skip
    assert min(late) >= 0
    assert max(late) <= 2, late
    assert robot.of("h"), "it never held before it stopped"
