"""Says while a driver, an operator's device or a reward does not come back from a call, and ends the actor over it.

    actor loop ─▶ calls.Calls.current ─▶ CallWatch, a thread ─▶ Observer.trouble: the actor's screen, the next heartbeat
                                                             └▶ after restart_s: robot stopped, ticks spooled, _exit(1)

Started by the actor's main. A thread, because the loop is in that call. It reads memory; a driver that keeps the Python
interpreter stops it too, and then the learner hears nothing of this actor any more: `faulthandler`'s own thread, which
needs no Python, ends the process a little later. Who keeps the actor (run_actor.sh, start.sh) starts it again.
"""

import contextlib
import faulthandler
import os
import time
from collections.abc import Callable, Iterator

from serl_robot_infra.calls import Calls
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import repeated

LIMIT_S = 0.5  # where no watchdog has another one
RESET_S = 20.0  # homing and waiting for a scene to settle take their time
RESETS_TAKE = 10  # times restart_s, before a reset is given up
STOP_S = 2.0  # for the guard to stop the robot, before the process ends
BLIND_S = 20.0  # beyond restart_s: this thread has had no turn either
_FEED_S = 1.0
_STDERR = 2


class CallWatch:
    """Tells of a call that takes longer than the watchdog's limit; a reset may take RESET_S.

    The trouble is over with the next tick, as `StatusObserver` sees it. rescue: sends what the loop has not sent.
    restart_s: a call that takes longer ends the process, a reset after RESETS_TAKE times that; None: never.
    """

    def __init__(
        self,
        calls: Calls,
        guard: RobotGuard,
        observer: Observer,
        rescue: Callable[[], None] = lambda: None,
        restart_s: float | None = None,
    ) -> None:
        self._calls, self._guard, self._observer = calls, guard, observer
        self._rescue, self._restart_s = rescue, restart_s
        self.limit_s = guard.stop_s or LIMIT_S
        self._told = ""  # the call that is told of
        self._longest = 0.0  # seconds that it has taken so far

    def look(self) -> None:
        """Several times a limit."""
        name, seconds = self._calls.current or ("", 0.0)
        is_reset = name.endswith(".reset")
        limit_s = max(self.limit_s, RESET_S) if is_reset else self.limit_s
        if self._told and (name != self._told or seconds < self._longest):
            self._observer.message(f"{self._told} came back after {self._longest:.1f} s")
            self._told = ""
        if seconds > limit_s:
            self._told, self._longest = name, seconds
            self._observer.trouble(f"{name} has not come back for {seconds:.1f} s{self._robot()}")
        if name and self._restart_s is not None and seconds > self._restart_s * (RESETS_TAKE if is_reset else 1):
            self._give_up(name, seconds)

    def _give_up(self, name: str, seconds: float) -> None:
        if not self._calls.give_up(name):
            return
        reason = f"{name} did not come back within {seconds:.0f} s (rollout.watchdog.restart_s)"
        self._guard.leave(reason)
        deadline = time.monotonic() + STOP_S
        while self._guard.moving and time.monotonic() < deadline:
            time.sleep(0.01)
        stopped = "; the robot did not take a stop" if self._guard.moving else ""
        kept = "what was recorded is sent at the next start"
        try:
            self._rescue()
        except Exception as fault:
            kept = f"its last ticks are lost: {fault}"
        self._observer.trouble(f"{reason}: this process ends{stopped}; {kept}")
        os._exit(1)  # the loop's thread cannot be ended otherwise

    def _robot(self) -> str:
        if self._guard.tripped:
            return "; the robot was told to stop"
        return "; the robot was told to hold" if self._guard.held else ""


@contextlib.contextmanager
def watching_calls(
    calls: Calls,
    guard: RobotGuard,
    observer: Observer,
    rescue: Callable[[], None] = lambda: None,
    restart_s: float | None = None,
) -> Iterator[None]:
    """A CallWatch on a thread of its own for as long as this lasts; it looks ten times a limit."""
    watch, feed = CallWatch(calls, guard, observer, rescue, restart_s), _feeder(restart_s)

    def look() -> None:
        feed()
        watch.look()

    with repeated("call-watch", min(watch.limit_s / 10, 1.0), look):
        yield  # what closes devices afterwards has as long as the last feed gave
    watch.look()  # a call that came back in the last moment is told of, too


def _feeder(restart_s: float | None) -> Callable[[], None]:
    """What must be called again and again; else the process ends, its threads' stacks on stderr."""
    fed = float("-inf")

    def feed() -> None:
        nonlocal fed
        if restart_s is not None and time.monotonic() - fed >= _FEED_S:
            fed = time.monotonic()
            faulthandler.dump_traceback_later(restart_s + BLIND_S, exit=True, file=_STDERR)

    return feed
