"""Watches the control loop from a thread of its own: stops the robot when nobody else can.

    every half period:  e-stop pressed?                      ─▶ robot.stop(), once for each press
                        SIGINT, SIGTERM, SIGHUP, moving?      ─▶ robot.stop()
                        no action sent for stop_ms?           ─▶ robot.stop(), and the episode is over (`tripped`)
                        no action sent for two periods?       ─▶ robot.hold(), every period
    the episode ended, whatever ended it                      ─▶ rest(): hold() or stop(), in the control loop's thread

Fed by the episode runner with each action that it sends. What makes the loop silent does not matter: a learner that was
stopped, a link that was cut, a full disk, a driver that hangs. Armed from an episode's first action until the robot was
told to hold or to stop. It asks memory and the driver, never a disk. A driver that keeps the whole interpreter busy
stops this thread, too: the watchdog process (watchdog.py) is for that.
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.watchdog import WatchdogProcess

log = logging.getLogger(__name__)

_SIMULATED_PERIOD_S = 0.02
_LEAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOG_S = 1.0  # between two lines about a driver that does not stop


@runtime_checkable
class Stoppable(Protocol):
    """A robot that moves by itself between two actions. Both are called from any thread, also during `step`."""

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
        watchdog: the process that does the same when this one cannot; None: there is none.
    """

    def __init__(
        self,
        robot: Stoppable | None,
        estop: EmergencyStop,
        rate_hz: float,
        stop_s: float | None,
        watchdog: WatchdogProcess | None = None,
    ):
        if stop_s is not None and stop_s <= 0:
            raise ValueError(f"rollout.watchdog.stop_ms: expected a number above 0, got {stop_s * 1e3:g}")
        self._robot, self.estop, self.stop_s, self.watchdog = robot, estop, stop_s, watchdog
        self.set_rate(rate_hz)
        self._held_at = 0.0  # monotonic seconds of the last hold
        self._fed: float | None = None  # monotonic seconds of the last action; None: not armed
        self._moving = False  # since the last hold or stop it was reset or fed
        self._resetting = False  # a reset has begun, and no action was sent since
        self._stopped_at = 0.0  # monotonic seconds of the last stop
        self._stopped_for: str | None = None  # the e-stop that the robot was stopped for
        self._stop_due = False  # a stop that the robot has not taken yet
        self._leaving: str | None = None  # what ends this process
        self._complained = -_LOG_S  # monotonic seconds of the last line about a driver that fails
        self._lock = threading.Lock()  # an action is never sent beside a hold or a stop
        self.tripped: str | None = None  # why the running episode must end
        self.held = False  # whether the robot held since the last action
        self._signals, self._wake = os.pipe()  # the C signal handler writes to it, and whoever wakes the thread
        for end in (self._signals, self._wake):
            os.set_blocking(end, False)
        estop.on_change = self._look_now
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="robot-guard", daemon=True)
        self._thread.start()

    def set_rate(self, rate_hz: float) -> None:
        """Of the control loop, between two episodes; 0: as fast as possible. `stop_s` stays."""
        self._period = min(1.0 / rate_hz, _SIMULATED_PERIOD_S) if rate_hz else _SIMULATED_PERIOD_S
        self._hold_s = 2.0 / rate_hz if rate_hz else _SIMULATED_PERIOD_S * 2

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Meanwhile SIGUSR1 presses the e-stop, and what ends this process stops the robot; main thread only.

        Python runs signal handlers in the main thread, which may hang in a driver; the wake-up pipe is written at once,
        and the guard reads it.
        """
        handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
        pipe = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(pipe)
            signal.signal(signal.SIGUSR1, handler)

    def forbids(self) -> str | None:
        """Why no action may be sent; None when it may."""
        if reason := self.estop.reason():
            return f"e-stop pressed: {reason}"
        if self.watchdog is not None and (reason := self.watchdog.forbids()):
            return reason
        return self.tripped or self._leaving

    def begin(self) -> str | None:
        """The robot is about to be reset, which moves it; why it must not be, or None."""
        with self._lock:
            reason = self.forbids()
            if reason is None:
                self._moving = self._resetting = True
                if self.watchdog is not None:
                    self.watchdog.begin()
            return reason

    def feed(self) -> str | None:
        """An action is about to be sent; why it must not be, or None."""
        with self._lock:
            self._trip(time.monotonic())  # the thread may not have had its turn
            reason = self.forbids()
            if reason is None:
                self._fed, self.held, self._moving, self._resetting = time.monotonic(), False, True, False
                if self.watchdog is not None:
                    self.watchdog.feed()
            return reason

    def disarm(self) -> None:
        """The episode is over by the environment's own word, which brings its robot to rest."""
        with self._lock:
            self._at_rest()

    def rest(self, stop: bool) -> None:
        """The episode is over, and not by the environment's word: tell the robot to hold, or to stop.

        What the driver refuses the thread tries again, and stays armed until it was taken.
        """
        with self._lock:
            stop = stop or self._stop_due or (self.watchdog is not None and self.watchdog.forbids() is not None)
            if not self._moving or self._told(self._stop if stop else self._hold):
                self._at_rest()
            else:
                self._stop_due = True

    def leave(self, reason: str) -> None:
        """This process is about to end: the thread stops a robot that moves, and nothing is sent any more."""
        self._leaving = reason
        self._look_now()

    @property
    def moving(self) -> bool:
        """Was the robot reset or fed since it held or stopped?"""
        return self._moving

    def close(self) -> None:
        """Stop a robot that was not told to rest, and end the threads and the watchdog process."""
        with self._lock:
            if self._moving:
                self._stop_due = True
                self._told(self._stop)
        self._ending = True
        self._look_now()
        self._thread.join()
        self.estop.on_change = lambda: None
        if self.watchdog is not None:
            self.watchdog.close()
        os.close(self._signals)
        os.close(self._wake)

    def _run(self) -> None:
        # Twice a period, so that what nobody wakes it for is acted on within one.
        while not self._ending:
            self._read_signals(self._period / 2)
            with self._lock:
                self._look(time.monotonic())

    def _read_signals(self, timeout_s: float) -> None:
        """Wait for a signal or a press."""
        select.select([self._signals], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            while numbers := os.read(self._signals, 64):
                if signal.SIGUSR1 in numbers:
                    self.estop.press("SIGUSR1")
                for number in _LEAVING:
                    if number in numbers:
                        self._leaving = f"stopped by {number.name}"

    def _look_now(self) -> None:
        with contextlib.suppress(OSError):  # it is awake already, or closed
            os.write(self._wake, b"\0")

    def _look(self, now: float) -> None:
        reason = self.estop.reason()
        if (reason is None) != (self._stopped_for is None):
            self._stopped_for, self._stop_due = reason, reason is not None or self._stop_due
            if reason is not None and self._moving:  # the episode ends, even if it is released before the next action
                self.tripped = self.tripped or f"e-stop pressed: {reason}"
        if self._leaving and self._moving:
            self._stop_due = True
        if self._resetting and (reason or self._leaving) and now - self._stopped_at >= self._period:
            self._stop_due = True  # again and again: a driver's reset may clear a stop that came as it began
        silent = self._trip(now)
        if self._stop_due:
            self._told(self._stop)
        elif self._robot is not None and silent > self._hold_s and now - self._held_at >= self._period:
            self.held, self._held_at = True, now
            self._told(self._hold)

    def _trip(self, now: float) -> float:
        """Seconds of silence; too many end the episode."""
        silent = 0.0 if self._fed is None or self.tripped or not self._moving else now - self._fed
        if self.stop_s is not None and silent > self.stop_s:
            self.tripped = f"no action for {silent * 1e3:.0f} ms: controlled stop (rollout.watchdog.stop_ms)"
            self._stop_due = True
        return silent

    def _at_rest(self) -> None:
        """The episode is over, and the robot stands or was told to."""
        self._fed, self.tripped, self.held, self._moving, self._resetting = None, None, False, False, False
        if self.watchdog is not None:
            self.watchdog.disarm()

    def _stop(self) -> None:
        if self._robot is not None:
            self._robot.stop()
        self._stop_due, self._moving, self._stopped_at = False, False, time.monotonic()
        if self.watchdog is not None:
            self.watchdog.disarm()
        if self._stopped_for is not None:
            self.estop.obeyed()

    def _hold(self) -> None:
        if self._robot is not None:
            self._robot.hold()

    def _told(self, what: Callable[[], None]) -> bool:
        """Did the driver take it? One that fails must not end the watch over it."""
        try:
            what()
            return True
        except Exception:
            if time.monotonic() - self._complained >= _LOG_S:
                self._complained = time.monotonic()
                log.exception("the robot's hold or stop failed; trying again")
            return False
