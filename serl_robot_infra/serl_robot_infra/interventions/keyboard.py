"""The terminal's keys as an operator's device: `operator=keyboard`. Built from config/operator/keyboard.yaml.

A terminal tells presses and nothing of releases; a key that is held is pressed again 20 to 40 times a second, after a
first pause of a third to two thirds of a second, and of several held keys only the newest repeats. So a press moves for
`hold_s` and no longer: a tap is one small step, a held key is one step, a pause, and then motion that ends `hold_s`
after the key was let go.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

from serl_robot_infra.envs.base import Environment
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_robot_infra.interventions.hand import (
    MEANINGS,
    HandOperator,
    HandSettings,
    check_commands,
    usable_axes,
)
from serl_robot_infra.keyboard import Keyboard, terminal_keyboard


class KeyboardOperator(HandOperator):
    """Drives by hand from the terminal at which the actor runs; the keys are of config/operator/keyboard.yaml.

    axes: action name -> [key that increases it, key that decreases it]. keys: command (`hand.COMMANDS`) -> key, null
    for none. hold_s: seconds that a press moves. The others: `hand.HandSettings`. ValueError: no terminal, or a key
    that is somebody else's.
    """

    def __init__(
        self,
        env: Environment,
        axes: Mapping[str, Sequence[str]],
        keys: Mapping[str, str | None],
        hold_s: float,
        **settings,
    ):
        keyboard = terminal_keyboard()
        if keyboard is None:
            raise ValueError(
                "operator=keyboard needs a terminal to press keys at: start the actor in one (run_actor.sh, or "
                "start.sh in its tmux panes)"
            )
        names, checked = usable_axes(axes, env.spec), HandSettings(**settings)
        device = Keys(keyboard, {name: axes[name] for name in names}, check_commands(keys, "operator.keys"), hold_s)
        super().__init__(device, env.spec, names, checked)


class Keys:
    """Answers `hand.HandDevice`."""

    def __init__(
        self, keyboard: Keyboard, axes: Mapping[str, Sequence[str]], keys: Mapping[str, str], hold_s: float
    ) -> None:
        if isinstance(hold_s, bool) or not isinstance(hold_s, int | float) or not hold_s > 0:
            raise ValueError(f"operator.hold_s: expected a number above 0, got {hold_s!r}")
        self._keyboard, self._axes, self._keys, self._hold_s = keyboard, axes, keys, hold_s
        self.commands = tuple(keys)
        self._lock = threading.Lock()
        self._pressed: list[str] = []
        self._moved: dict[str, tuple[float, float, bool]] = {}  # action name -> direction, when, seen by a tick
        for name, pair in axes.items():
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"operator.axes.{name}: expected [key that increases it, key that decreases it]")
            for place, (key, direction) in enumerate(zip(pair, (1.0, -1.0), strict=True)):
                keyboard.on(key, partial(self._move, name, direction), f"operator.axes.{name}.{place}")
        for command, key in keys.items():
            keyboard.on(key, partial(self._command, command), f"operator.keys.{command}")

    def motion(self) -> Mapping[str, float]:
        self._check()
        now, deflections = time.monotonic(), {}
        with self._lock:
            for name, (direction, at, seen) in self._moved.items():
                deflections[name] = direction if now - at < self._hold_s or not seen else 0.0
                self._moved[name] = (direction, at, True)
        return deflections

    def pressed(self) -> Sequence[str]:
        self._check()
        with self._lock:
            commands, self._pressed = self._pressed, []
        return commands

    def holds_takeover(self) -> bool:
        return False

    def missing(self) -> str | None:
        return "the operator's terminal was closed" if self._keyboard.closed else None

    def describe(self) -> Sequence[str]:
        moves = [f"{pair[0]} / {pair[1]}: {name} + / -" for name, pair in self._axes.items()]
        return [*moves, *(f"{key}: {MEANINGS[command]}" for command, key in self._keys.items())]

    def close(self) -> None:
        """The terminal is the process's."""

    def _check(self) -> None:
        if reason := self.missing():
            raise OperatorGoneError(reason)

    def _move(self, name: str, direction: float) -> None:
        with self._lock:
            self._moved[name] = (direction, time.monotonic(), False)

    def _command(self, command: str) -> None:
        with self._lock:
            self._pressed.append(command)
