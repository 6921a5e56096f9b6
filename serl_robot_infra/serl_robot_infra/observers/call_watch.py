"""Says while a driver, an operator's device or a reward does not come back from a call. Started by the actor's main.

    actor loop ─▶ calls.Calls.current ─▶ CallWatch, a thread ─▶ Observer.trouble: the actor's screen, the next heartbeat

A thread, because the loop is in that call. It reads memory; a driver that keeps the Python interpreter stops it too,
and then the learner hears nothing of this actor any more.
"""

import contextlib
from collections.abc import Iterator

from serl_robot_infra.calls import Calls
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import repeated

LIMIT_S = 0.5  # where no watchdog has another one
RESET_S = 20.0  # homing and waiting for a scene to settle take their time


class CallWatch:
    """Tells of a call that takes longer than the watchdog's limit; a reset may take RESET_S.

    The trouble is over with the next tick, as `StatusObserver` sees it.
    """

    def __init__(self, calls: Calls, guard: RobotGuard, observer: Observer) -> None:
        self._calls, self._guard, self._observer = calls, guard, observer
        self.limit_s = guard.stop_s or LIMIT_S
        self._told = ""  # the call that is told of
        self._longest = 0.0  # seconds that it has taken so far

    def look(self) -> None:
        """Several times a limit."""
        name, seconds = self._calls.current or ("", 0.0)
        limit_s = max(self.limit_s, RESET_S) if name.endswith(".reset") else self.limit_s
        if self._told and (name != self._told or seconds < self._longest):
            self._observer.message(f"{self._told} came back after {self._longest:.1f} s")
            self._told = ""
        if seconds > limit_s:
            self._told, self._longest = name, seconds
            self._observer.trouble(f"{name} has not come back for {seconds:.1f} s{self._robot()}")

    def _robot(self) -> str:
        if self._guard.tripped:
            return "; the robot was told to stop"
        return "; the robot was told to hold" if self._guard.held else ""


@contextlib.contextmanager
def watching_calls(calls: Calls, guard: RobotGuard, observer: Observer) -> Iterator[None]:
    """A CallWatch on a thread of its own for as long as this lasts; it looks ten times a limit."""
    watch = CallWatch(calls, guard, observer)
    with repeated("call-watch", min(watch.limit_s / 10, 1.0), watch.look):
        yield
