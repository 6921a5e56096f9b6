"""A person judges with keys of the actor's terminal. `reward=human_key`: where there is no operator's device, or one
without buttons, such as a leader arm.

    keyboard.Keyboard ─▶ Words ─▶ asked by the episode runner after each tick, with the operator's own
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from serl_robot_infra.interventions.base import NOTHING_SAID, OperatorGoneError, Voice, Words
from serl_robot_infra.interventions.hand import MEANINGS
from serl_robot_infra.keyboard import terminal_keyboard
from serl_robot_infra.rewards.operator import OperatorReward


class HumanKeyReward(OperatorReward, Voice):
    """Answers `rewards.base.RewardSource` and `interventions.base.Voice`.

    <word>_key: single characters, or `space` and the like; None: no key for that word. Raises ValueError when there is
    no terminal to press keys at, or a key has an owner.
    """

    def __init__(
        self,
        success_key: str = "s",
        failure_key: str = "f",
        discard_key: str | None = None,
        ready_key: str | None = None,
        stop_key: str | None = None,
    ) -> None:
        given = {
            "success": success_key, "failure": failure_key, "discard": discard_key, "ready": ready_key,
            "stop": stop_key,
        }  # fmt: skip
        self._keys = {word: key for word, key in given.items() if key is not None}
        self.vocabulary = tuple(self._keys)
        self._said = NOTHING_SAID
        self._lock = threading.Lock()
        keyboard = terminal_keyboard()
        if keyboard is None:
            raise ValueError(
                "reward=human_key needs a terminal to press keys at; start the actor in one (run_actor.sh)"
            )
        self._keyboard = keyboard
        for word, key in self._keys.items():
            keyboard.on(key, partial(self._press, word), f"reward.{word}_key")

    def words(self) -> Words:
        if reason := self.missing():
            raise OperatorGoneError(reason)
        with self._lock:
            said, self._said = self._said, NOTHING_SAID
        return said

    def describe(self) -> Sequence[str]:
        return [f"{key}: {MEANINGS[word]}" for word, key in self._keys.items()]

    def missing(self) -> str | None:
        return "the terminal of reward=human_key was closed" if self._keyboard.closed else None

    def _press(self, word: str) -> None:
        with self._lock:
            self._said = replace(self._said, **{word: True})
