"""Is a role at work? Its beats as the supervisor sees them (run.alive), and processes that a signal has stopped.

    beats ─▶ Pulse.look, once a second ─▶ None | Silence: worth a line after NOTICED_S, over after what is allowed

Time counts in looks, each for LONGEST_LOOK_S at most: a supervisor that was itself stopped, or a machine that slept,
finds nobody guilty when it wakes up. Wall clocks play no part.
"""

import os
from dataclasses import dataclass

from serl_launcher.run.alive import SIZE, Beat

LONGEST_LOOK_S = 2.0
NOTICED_S = 6.0  # silence is shown, or after a fifth of what the role said that it would take
STUCK_S = 20.0  # and ends the role, unless it said that it would take longer
STOPPED_S = 2.0  # a stopped role (SIGSTOP) is ended; it is shown at once
SLOW_START_S = 30.0  # a start that takes longer is shown
START_S = 1800.0  # and so long it may take: large weights from a slow disk, compiling


@dataclass(frozen=True, slots=True)
class Silence:
    """A role that gives no sign of life."""

    text: str  # for people: how long, and in what
    over: bool  # no hope is left: it must be ended
    stopped: bool = False  # by a signal; otherwise it can still write down where it hangs


class Pulse:
    """The beats of one role over all its lives. `path` names the memory, for its environment."""

    def __init__(self) -> None:
        self._memory = os.fdopen(os.memfd_create("flowserl-beat"), "r+b", buffering=0)
        self.path = f"/proc/{os.getpid()}/fd/{self._memory.fileno()}"
        self.reset()

    def reset(self) -> None:
        """A new life begins."""
        os.pwrite(self._memory.fileno(), bytes(SIZE), 0)
        self.last = Beat()
        self._silent_s = self._stopped_s = 0.0

    def look(self, passed_s: float, *, ready: bool, stopped: bool) -> Silence | None:
        """What there is to say; passed_s: since the last look. stopped: is one of its processes (state T)?"""
        passed_s = min(passed_s, LONGEST_LOOK_S)
        beat = Beat.decode(os.pread(self._memory.fileno(), SIZE, 0))
        self._silent_s = 0.0 if beat.count != self.last.count else self._silent_s + passed_s
        self._stopped_s = self._stopped_s + passed_s if stopped else 0.0
        self.last = beat
        if stopped:
            return Silence(f"stopped (SIGSTOP) for {self._stopped_s:.0f} s", self._stopped_s > STOPPED_S, True)
        if not ready:
            return self._start()
        allowed_s = max(STUCK_S, beat.allowed_s)
        if beat.count == 0 or self._silent_s < max(NOTICED_S, beat.allowed_s / 5):  # 0: a role that does not beat
            return None
        doing = f": {beat.doing}, which may take {allowed_s:.0f} s" if beat.doing else ""
        return Silence(f"silent for {self._silent_s:.0f} s{doing}", self._silent_s > allowed_s)

    def _start(self) -> Silence | None:
        """Before it is ready only the whole start is bounded: it may load, recover and compile."""
        if self._silent_s < SLOW_START_S:
            return None
        return Silence(f"not up yet, no sign of life for {self._silent_s:.0f} s", self._silent_s > START_S)
