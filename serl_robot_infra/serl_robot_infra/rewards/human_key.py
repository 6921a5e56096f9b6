"""A person judges with two keys of the terminal: one for success, one for failure. `reward=human_key`.

    terminal ─▶ key thread ─▶ last key pressed ─▶ judge: consumed at the next tick

A key pressed before an episode is forgotten at its reset. Without a key the environment's own end is a failure.
"""

import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable
from dataclasses import replace

from serl_robot_infra.envs.base import StepResult

POLL_S = 0.1


class HumanKeyReward:
    """Answers `rewards.base.RewardSource`.

    success_key, failure_key: single characters. read_key: waits at most POLL_S for a key; None: the terminal's.
    Raises ValueError when there is no terminal to press keys at.
    """

    success_source = "human"

    def __init__(
        self, success_key: str = "s", failure_key: str = "f", read_key: Callable[[], str | None] | None = None
    ) -> None:
        if len(success_key) != 1 or len(failure_key) != 1 or success_key == failure_key:
            raise ValueError(f"reward: expected two different keys, got {success_key!r} and {failure_key!r}")
        self._success, self._failure = success_key, failure_key
        self._pressed: str | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, args=(read_key or _terminal(),), name="keys", daemon=True).start()

    def reset(self) -> None:
        """Begin an episode."""
        self._take()

    def judge(self, result: StepResult) -> StepResult:
        """Success key: reward 1 and the end. Failure key: the end. Otherwise the environment's end, as a failure."""
        key = self._take()
        success = key == self._success
        ended = success or key == self._failure or result.terminated
        return replace(result, reward=float(success), success=success, terminated=ended)

    def _take(self) -> str | None:
        with self._lock:
            key, self._pressed = self._pressed, None
        return key

    def _listen(self, read_key: Callable[[], str | None]) -> None:
        while True:
            key = read_key()
            if key in (self._success, self._failure):
                with self._lock:
                    self._pressed = key


def _terminal() -> Callable[[], str | None]:
    """Keys of standard input without waiting for return; the terminal is restored when the process ends."""
    if not sys.stdin.isatty():
        raise ValueError("reward=human_key needs a terminal to press keys at; start the actor in one (run_actor.sh)")
    import atexit

    file = sys.stdin.fileno()
    atexit.register(termios.tcsetattr, file, termios.TCSADRAIN, termios.tcgetattr(file))
    tty.setcbreak(file)

    def read() -> str | None:
        ready, _, _ = select.select([file], [], [], POLL_S)
        return os.read(file, 1).decode(errors="replace") if ready else None

    return read
