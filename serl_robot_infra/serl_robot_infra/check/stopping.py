"""Is a stop heard, and does it reach the driver? E-stop, watchdog thread, watchdog process; the robot stands meanwhile.

Called by `robot.check`, last: after it the driver ignores actions until its reset. The classes are the actor's own
(`estop`, `guard`, `watchdog`), on a latch of this check's folder; nothing is sent, so there is nothing to stop but the
driver is told as it would be in an episode.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from serl_robot_infra.check.report import Report
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard, Stoppable
from serl_robot_infra.operators import control_rate
from serl_robot_infra.watchdog import WatchdogProcess
from serl_robot_infra.wiring import build_guard, describe_guard

_PATIENCE_S = 2.0
_LATE_S = 0.1  # more than a period and so long after its time a stop is late


class Witness:
    """The robot as the guard sees it; notes when a hold and a stop came back from the driver."""

    def __init__(self, robot: Any):
        self._robot = robot
        self.held: list[float] = []  # monotonic seconds
        self.stopped: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._robot, name)

    def hold(self) -> None:
        """The robot's."""
        self._robot.hold()
        self.held.append(time.monotonic())

    def stop(self) -> None:
        """The robot's."""
        self._robot.stop()
        self.stopped.append(time.monotonic())


def check_latch(report: Report, run: Path) -> None:
    """Is the run's e-stop pressed?"""
    estop = EmergencyStop(run / "estop")
    try:
        reason = estop.reason()
    finally:
        estop.close()
    if reason is not None:
        report.fail("e-stop's latch", f"pressed: {reason}", f"when it is safe: python3 tools/estop.py {run} --reset")


def check_stops(report: Report, cfg: DictConfig, env: Environment, folder: Path) -> None:
    """Press, be silent, and see what the driver was told."""
    robot = isinstance(env, Stoppable)
    seen = Witness(env) if robot else env
    latch = folder / "estop"
    latch.unlink(missing_ok=True)
    estop = EmergencyStop(latch)
    guard = build_guard(cfg, seen, estop)
    try:
        if robot:
            _tell_guard(report, guard, env)
            _check_press(report, guard, seen, latch)
            _check_silence(report, guard, seen, 2.0 / (control_rate(cfg, env.spec) or env.spec.control_hz))
        else:
            _check_simulated_press(report, guard, latch)
    finally:
        guard.close()
        estop.close()
        latch.unlink(missing_ok=True)
    if guard.watchdog is not None:
        _check_process(report, env, guard, latch)


def _tell_guard(report: Report, guard: RobotGuard, env: Environment) -> None:
    said = describe_guard(guard, env)
    if guard.stop_s is None:
        report.fail("watchdog", said, "rollout.watchdog.enabled=auto")
    elif "names no stopper" in said:
        report.warn("watchdog", said, "a stopper, where the controller can be reached twice: docs/safety.md")
    else:
        report.ok("watchdog", said)


def _check_press(report: Report, guard: RobotGuard, robot: Witness, latch: Path) -> None:
    """By the file, as tools/estop.py does it."""
    guard.begin()
    pressed = time.monotonic()
    latch.write_text("check_robot presses it\n")
    if not _until(lambda: bool(robot.stopped)):
        report.fail("e-stop", f"pressed, and stop() did not come back within {_PATIENCE_S:g} s",
                    "the driver's stop(): the log lines above say what it raised, or it hangs")  # fmt: skip
        return
    took = robot.stopped[0] - pressed
    report.figures["e-stop, pressed to stopped, ms"] = took * 1e3
    if guard.feed() is None:
        report.fail("e-stop", "pressed and stopped, and the next action was allowed", "this is a bug of FlowSERL")
        return
    latch.unlink()
    released = _until(lambda: guard.estop.reason() is None)
    guard.rest(stop=False)
    if not released:
        report.fail("e-stop", "its file was removed, and it counts as pressed", f"the disk of {latch.parent}")
        return
    report.ok(
        "e-stop", f"pressed by its file: stop() came back after {took * 1e3:.0f} ms; latched until it was removed"
    )


def _check_silence(report: Report, guard: RobotGuard, robot: Witness, hold_s: float) -> None:
    """An episode whose next action never comes: a hold after two periods, unless the stop comes first."""
    if guard.stop_s is None:
        return
    robot.held.clear()
    robot.stopped.clear()
    guard.begin()
    fed = time.monotonic()
    if (reason := guard.feed()) is not None:
        report.skip("silence", f"nothing may move: {reason}")
        return
    came = _until(lambda: bool(robot.stopped), guard.stop_s + _PATIENCE_S)
    guard.rest(stop=True)
    if not came or (not robot.held and guard.stop_s > hold_s + _LATE_S):
        what = "stop()" if not came else "hold()"
        report.fail("silence", f"no action came, and {what} did not come back from the driver in time",
                    f"the driver's {what}: the log lines above say what it raised, or it hangs")  # fmt: skip
        return
    took = robot.stopped[0] - fed
    report.figures["silence to stopped, ms"] = took * 1e3
    held = f"hold() after {(robot.held[0] - fed) * 1e3:.0f} ms, " if robot.held else ""
    says = f"{held}stop() after {took * 1e3:.0f} ms without an action"
    if took > guard.stop_s + _LATE_S:
        report.warn(
            "silence", f"{says}: later than {guard.stop_s * 1e3:g} ms", "a busy host, or a slow driver's hold()"
        )
    else:
        report.ok("silence", says)


def _check_simulated_press(report: Report, guard: RobotGuard, latch: Path) -> None:
    latch.write_text("check_robot presses it\n")
    if _until(lambda: guard.feed() is not None):
        report.ok("e-stop", "pressed by its file: no action is sent. A simulation: there is no stop() to call")
    else:
        report.fail("e-stop", "pressed by its file and not heard", f"the disk of {latch.parent}")


def _check_process(report: Report, env: Environment, guard: RobotGuard, latch: Path) -> None:
    """The same silence for the process alone."""
    assert guard.stop_s is not None
    process = WatchdogProcess(env.stopper, latch, 1.0 / env.spec.control_hz, guard.stop_s)
    try:
        process.begin()
        process.feed()
        if _until(lambda: process.forbids() is not None, guard.stop_s + _PATIENCE_S):
            report.ok("stopper", f"{process.forbids()}, over its own way")
        else:
            report.fail(
                "stopper", "no action came, and its stop() did not come back", "its connection; the lines above"
            )
    finally:
        process.close()


def _until(condition: Callable[[], bool], seconds: float = _PATIENCE_S) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
