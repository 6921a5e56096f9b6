"""A person judges with two keys of the terminal: one for success, one for failure. `reward=human_key`.

    keyboard.Keyboard ─▶ last key pressed ─▶ judge: consumed at the next tick

A key pressed before an episode is forgotten at its reset. Without a key the environment's own end is a failure.
"""

import threading
from dataclasses import replace
from functools import partial

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.keyboard import terminal_keyboard


class HumanKeyReward:
    """Answers `rewards.base.RewardSource`.

    success_key, failure_key: single characters, or `space` and the like. Raises ValueError when there is no terminal to
    press keys at.
    """

    success_source = "human"

    def __init__(self, success_key: str = "s", failure_key: str = "f") -> None:
        if success_key == failure_key:
            raise ValueError(f"reward: expected two different keys, got {success_key!r} and {failure_key!r}")
        self._pressed: str | None = None
        self._lock = threading.Lock()
        keyboard = terminal_keyboard()
        if keyboard is None:
            raise ValueError(
                "reward=human_key needs a terminal to press keys at; start the actor in one (run_actor.sh)"
            )
        for outcome, key in (("success", success_key), ("failure", failure_key)):
            keyboard.on(key, partial(self._press, outcome), f"reward.{outcome}_key")

    def reset(self) -> None:
        self._take()

    def judge(self, result: StepResult) -> StepResult:
        """Success key: reward 1 and the end. Failure key: the end. Otherwise the environment's end, as a failure."""
        pressed = self._take()
        success = pressed == "success"
        ended = pressed is not None or result.terminated
        return replace(result, reward=float(success), success=success, terminated=ended)

    def _take(self) -> str | None:
        with self._lock:
            pressed, self._pressed = self._pressed, None
        return pressed

    def _press(self, outcome: str) -> None:
        with self._lock:
            self._pressed = outcome
