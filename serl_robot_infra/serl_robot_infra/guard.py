"""Watches the control loop from a thread of its own: stops the robot when nobody else can.

    every period:  e-stop latched?                       ─▶ robot.stop(), once for each press
                   no action sent for stop_ms?           ─▶ robot.stop(), and the episode is over (`tripped`)
                   no action sent for two periods?       ─▶ robot.hold(), every period

Fed by the episode runner with each action that it sends. What makes the loop silent does not matter: a learner that was
stopped, a link that was cut, a full disk, a driver that hangs. Armed from an episode's first action to its end.
"""

import logging
import threading
import time
from typing import Protocol, runtime_checkable

from serl_robot_infra.estop import EmergencyStop

log = logging.getLogger(__name__)

_SIMULATED_PERIOD_S = 0.02


@runtime_checkable
class Stoppable(Protocol):
    """A robot that moves by itself between two actions. Both are called from the guard's thread, also during `step`."""

    def hold(self) -> None:
        """Keep the present pose; repeated every period while no action comes."""
        ...

    def stop(self) -> None:
        """Come to a standstill as fast as is safe, and stay there until `reset`; actions are ignored until then."""
        ...


class RobotGuard:
    """Owns the thread.

    Args:
        robot: None for a simulation, which stands still while nobody steps it.
        estop: of this host.
        rate_hz: of the control loop; 0: as fast as possible.
        stop_s: silence after which the robot is stopped; None: no watchdog.
    """

    def __init__(self, robot: Stoppable | None, estop: EmergencyStop, rate_hz: float, stop_s: float | None):
        if stop_s is not None and stop_s <= 0:
            raise ValueError(f"rollout.watchdog.stop_ms: expected a number above 0, got {stop_s * 1e3:g}")
        self._robot, self.estop, self.stop_s = robot, estop, stop_s
        self._period = min(1.0 / rate_hz, _SIMULATED_PERIOD_S) if rate_hz else _SIMULATED_PERIOD_S
        self._held_at = 0.0  # monotonic seconds of the last hold
        self._hold_s = 2.0 / rate_hz if rate_hz else _SIMULATED_PERIOD_S * 2
        self._fed: float | None = None  # monotonic seconds of the last action; None: not armed
        self._stopped_for: str | None = None  # the e-stop that the robot was stopped for
        self._stop_due = False  # a stop that the robot has not taken yet
        self._lock = threading.Lock()  # an action is never sent beside a hold or a stop
        self.tripped: str | None = None  # why the running episode must end
        self.held = False  # whether the robot held since the last action
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="robot-guard", daemon=True)
        self._thread.start()

    def forbids(self) -> str | None:
        """Why no action may be sent; None when it may."""
        reason = self.estop.reason()
        return f"e-stop pressed: {reason}" if reason else self.tripped

    def feed(self) -> str | None:
        """An action is about to be sent; why it must not be, or None."""
        with self._lock:
            reason = self.forbids()
            if reason is None:
                self._fed, self.held = time.monotonic(), False
            return reason

    def disarm(self) -> None:
        """The episode is over."""
        with self._lock:
            self._fed, self.tripped, self.held = None, None, False

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        # Twice a period, so that a press is acted on within one.
        while not self._ending.wait(self._period / 2):
            try:
                self._look(time.monotonic())
            except Exception:  # a driver that fails must not end the watch over it
                log.exception("the robot's hold or stop failed; trying again")

    def _look(self, now: float) -> None:
        reason = self.estop.reason()
        with self._lock:
            if reason != self._stopped_for:
                self._stopped_for, self._stop_due = reason, reason is not None
            silent = 0.0 if self._fed is None or self.tripped else now - self._fed
            if self.stop_s is not None and silent > self.stop_s:
                self.tripped = f"no action for {silent * 1e3:.0f} ms: controlled stop (rollout.watchdog.stop_ms)"
                self._stop_due = True
            if self._robot is None:
                return
            if self._stop_due:
                self._robot.stop()
                self._stop_due = False
            elif silent > self._hold_s and reason is None and now - self._held_at >= self._period:
                self.held, self._held_at = True, now
                self._robot.hold()
