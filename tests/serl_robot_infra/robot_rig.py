"""A learner process and one actor process at a pseudo-terminal, for a test to press, stop and kill."""

import os
import subprocess
import time
from pathlib import Path

from robot_process import HZ, moves_of, start

PERIOD_S = 1 / HZ


class RobotRig:
    """Context manager; `folder` is the test's."""

    def __init__(self, folder: Path):
        self.moves, self.latch = folder / "moves", folder / "runs" / "test" / "estop"
        self._runs, self.log = folder / "runs", folder / "actor.log"
        self.actor: subprocess.Popen | None = None
        self._master = self._slave = -1

    def __enter__(self):
        self.learner = start({"role": "learner"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ports = [int(port) for port in self.learner.stdout.readline().split()]
        return self

    def start_actor(self, terminal: bool = True, **options) -> None:
        """Start it, at a terminal of its own or without one."""
        options |= {"role": "actor", "ports": self._ports, "runs": str(self._runs), "moves": str(self.moves)}
        self._close_terminal()
        if terminal:
            self._master, self._slave = os.openpty()
        with self.log.open("a") as log:
            self.actor = start(
                options | {"terminal": terminal}, stdin=self._slave if terminal else subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def press(self, key: bytes) -> float:
        """Type; when."""
        at = time.monotonic()
        os.write(self._master, key)
        return at

    def of(self, what: str, after: float = 0.0) -> list[float]:
        """When that happened to the robot after a moment."""
        return [at for at in moves_of(self.moves, what) if at > after]

    def wait(self, condition, what: str, seconds: float = 60.0) -> None:
        """Until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"never happened: {what}; {self.log.read_text()[-2000:]}"
            time.sleep(0.005)

    def wait_moving(self, ticks: int = 5) -> None:
        """Until it has moved for so many ticks from now on."""
        now = time.monotonic()
        self.wait(lambda: len(self.of("a", now)) >= ticks, "the robot moves")

    def __exit__(self, *error):
        self.kill_actor()
        self._close_terminal()
        self.learner.stdin.close()
        if self.learner.wait(20) is None:
            self.learner.kill()
        self.learner.stdout.close()

    def kill_actor(self) -> None:
        """kill -9."""
        if self.actor is not None:
            self.actor.kill()
            self.actor.wait()

    def _close_terminal(self) -> None:
        for end in (self._master, self._slave):
            if end >= 0:
                os.close(end)
        self._master = self._slave = -1
