"""The watchdog process of a robot: stops it when the actor's own process cannot. Started by `wiring`, fed by the guard.

    actor: guard ──reset, action, rest──▶ socket ──▶ watchdog process ──▶ stopper.stop(), over a way of its own
                                                       no action for stop_ms and a period · the actor is gone ·
                                                       e-stop latched and the actor has not stopped

A driver that keeps Python's interpreter for itself stops every thread of the actor, the guard's included; a kill −9
ends them all. This process shares neither. Only a driver that can be reached twice can have it: its class names a
`stopper`, a config node of what to make here, with a `stop()`; `StopCommand` is one for a command.
"""

import contextlib
import json
import logging
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.utils import instantiate

from serl_robot_infra.estop import EmergencyStop

log = logging.getLogger("watchdog")

START_S = 30.0  # to import the driver's module and connect
READY, STOPPED = b"R", b"S"  # from the process
MOVING, FED, REST, QUIT = b"m", b"f", b"r", b"q"  # to the process
_LOG_S = 1.0


class Stopper(Protocol):
    """Made in the watchdog process."""

    def stop(self) -> None:
        """Bring the robot to a standstill, whatever the actor does meanwhile; actions are ignored until its `reset`."""
        ...


class StopCommand:
    """Stops by running a command, such as a vendor's tool or one line to a second port of the controller.

    Raises subprocess.CalledProcessError when it fails, and TimeoutExpired after `timeout_s` seconds: it is tried again.
    """

    def __init__(self, argv: Sequence[str], timeout_s: float = 2.0):
        self._argv, self._timeout_s = list(argv), timeout_s

    def stop(self) -> None:
        """Run it."""
        subprocess.run(self._argv, check=True, timeout=self._timeout_s, stdin=subprocess.DEVNULL)


class WatchdogProcess:
    """The actor's end. Construction waits until the process has its way to the robot.

    Args:
        stopper: config node with a `_target_`, as the driver class names it.
        latch: the e-stop's file.
        period_s: of the control loop; stop_s: silence after which the robot is stopped (one period later than by the
            guard, which goes first).

    Raises ValueError when the stopper cannot be made.
    """

    def __init__(self, stopper: Mapping[str, Any], latch: Path, period_s: float, stop_s: float):
        self._link, theirs = socket.socketpair()
        options = {"stopper": dict(stopper), "latch": str(latch), "period_s": period_s, "stop_s": stop_s}
        command = [sys.executable, "-m", __name__, json.dumps({**options, "path": sys.path})]
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs, start_new_session=True)
        self._tripped = ""
        self._link.settimeout(START_S)
        try:
            ready = self._link.recv(1) == READY
        except TimeoutError:
            ready = False
        if not ready:
            self._process.kill()
            self._process.wait()
            self._link.close()
            raise ValueError(f"the stopper {stopper.get('_target_')} of this robot cannot be made; its words are above")
        self._link.setblocking(False)

    def forbids(self) -> str | None:
        """Why no action may be sent; None when it may."""
        if not self._tripped:
            try:
                said = self._link.recv(64)
                self._tripped = "the watchdog process stopped the robot" if said else self._gone()
            except BlockingIOError:
                return None
            except OSError:
                self._tripped = self._gone()
        return self._tripped

    def begin(self) -> None:
        """The robot is about to be reset."""
        self._send(MOVING)

    def feed(self) -> None:
        """An action is about to be sent."""
        self._send(FED)

    def disarm(self) -> None:
        """The robot stands, or has been told to."""
        if self._process.poll() is None:
            self._tripped = ""
            self._send(REST)

    def close(self) -> None:
        """The actor ends, and has stopped the robot."""
        self._send(QUIT)
        self._link.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: bytes) -> None:
        try:
            self._link.send(message)
        except OSError:  # it is dead or stuck: fail closed
            self._tripped = self._gone()

    def _gone(self) -> str:
        return "the watchdog process does not listen any more: no action is sent; start the actor again"


class Watch:
    """The process's loop: one thread, and the latch's."""

    def __init__(self, link: socket.socket, stopper: Stopper, estop: EmergencyStop, period_s: float, stop_s: float):
        self._link, self._stopper, self._estop = link, stopper, estop
        self._period_s, self._stop_s = period_s, stop_s + period_s
        self._fed: float | None = None  # monotonic seconds of the last action; None: no episode is running
        self._moving = False  # as far as the actor said
        self._pressed_at: float | None = None  # monotonic seconds since the e-stop is latched and the robot moves
        self._complained = -_LOG_S

    def run(self) -> None:
        """Until the actor says that it ends, or is gone."""
        while True:
            ready, _, _ = select.select([self._link], [], [], self._period_s / 2)
            if ready and not self._hear(self._link.recv(4096)):
                return
            if reason := self._due(time.monotonic()):
                self._stop(reason)

    def _hear(self, said: bytes) -> bool:
        """Take the actor's words; False when there will be no more."""
        if said.endswith(QUIT):
            return False
        if not said:
            while not self._stop("the actor is gone"):
                time.sleep(self._period_s)
            return False
        last = said[-1:]
        self._moving = last != REST
        self._fed = time.monotonic() if last == FED else None
        return True

    def _due(self, now: float) -> str | None:
        """Why the robot must be stopped now."""
        if not self._moving:
            self._pressed_at = None
            return None
        if self._fed is not None and now - self._fed > self._stop_s:
            return f"no action for {(now - self._fed) * 1e3:.0f} ms"
        if (pressed := self._estop.reason()) is None:
            self._pressed_at = None
        elif self._pressed_at is None:
            self._pressed_at = now
        elif now - self._pressed_at > self._period_s:  # the guard goes first
            return f"e-stop pressed: {pressed}"
        return None

    def _stop(self, reason: str) -> bool:
        try:
            self._stopper.stop()
        except Exception as error:
            if time.monotonic() - self._complained >= _LOG_S:
                self._complained = time.monotonic()
                log.error("%s: the stop failed, trying again: %s: %s", reason, type(error).__name__, error)
            return False
        log.warning("%s: the watchdog process stopped the robot", reason)
        self._moving, self._fed = False, None
        with contextlib.suppress(OSError):  # the actor may be gone
            self._link.send(STOPPED)
        return True


def main(argv: list[str]) -> int:
    """The process. 0: the actor ended, or was gone and the robot is stopped; 2: the stopper cannot be made."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its actor
    logging.basicConfig(level=logging.WARNING, format="watchdog: %(message)s")
    options = json.loads(argv[0])
    sys.path[:] = options["path"]
    with socket.socket(fileno=0) as link:
        try:
            stopper = instantiate(options["stopper"])
        except Exception as error:
            log.error("%s", " ".join(str(error).split()))
            return 2
        estop = EmergencyStop(Path(options["latch"]))
        link.send(READY)
        Watch(link, stopper, estop, options["period_s"], options["stop_s"]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
