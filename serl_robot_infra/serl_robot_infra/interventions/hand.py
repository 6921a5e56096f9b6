"""A person drives by hand: what keyboard, gamepad and SpaceMouse have in common. Extended by the three files beside.

    device ─▶ motion per action name, in [-1, 1] ─▶ takes over? ─▶ action float32[ad], a share of the task's limits
           └▶ commands: takeover, gripper, and the words of `base.Words`

A displacement moves while the device is deflected. A target position (task.spec.targets) begins at what the robot
senses when the person takes over and moves from there, never far ahead of it. The gripper keeps the command it had
until the person toggles it. So taking over moves nothing by itself.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from serl_config.nearest import nearest
from serl_robot_infra.interventions.base import NOTHING_SAID, WORDS, Intervention, Words
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

USUAL_AXES = ("dx", "dy", "dz", "drx", "dry", "drz")
"""Names that config/operator/*.yaml maps for everybody: a task that lacks one of them does without."""

USUAL_GRIPPERS = ("grip", "gripper")
COMMANDS = ("takeover", "gripper", *WORDS)
MEANINGS = {
    "takeover": "take over, let go",
    "gripper": "close or open the gripper",
    "success": "success: the episode ends",
    "failure": "failure: the episode ends",
    "discard": "discard the episode: nothing is learned from it",
    "ready": "ready: the scene is set (asked for before an episode, rollout.wait_for_ready)",
    "stop": "stop after this episode",
}
_LEAD_S = 0.3  # a target runs no further ahead of what is sensed than it moves in so long


class HandDevice(Protocol):
    """What a person holds. Every method raises OperatorGoneError when it is gone; none waits."""

    commands: Collection[str]
    """Those of COMMANDS that it has a key or a button for."""

    def motion(self) -> Mapping[str, float]:
        """Deflection per action name in [-1, 1], now; exactly 0 within the deadband."""
        ...

    def pressed(self) -> Sequence[str]:
        """The commands given since the last call, in order."""
        ...

    def holds_takeover(self) -> bool:
        """Is a button held that takes over as long as it is held?"""
        ...

    def missing(self) -> str | None:
        """As `base.Voice.missing`."""
        ...

    def describe(self) -> Sequence[str]:
        """A line for each key or button."""
        ...

    def close(self) -> None:
        """Let go; idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HandSettings:
    """What the yaml says beside the device's own keys (config/operator/)."""

    share: float  # of the action's limits at full deflection, above 0 and at most 1
    touch: bool  # does touching the device take over? false: only the takeover key or button does
    release_s: float  # untouched for so long, it lets go (where a touch took over), seconds
    gripper: str | None  # the action that the gripper key commands; auto: grip or gripper; null: none
    gripper_closed: str  # high or low: at which limit of that action the gripper is closed

    def __post_init__(self) -> None:
        if not 0 < _number(self.share, "share") <= 1:
            raise ValueError(f"operator.share: expected a number above 0 and at most 1, got {self.share!r}")
        if not _number(self.release_s, "release_s") > 0:
            raise ValueError(f"operator.release_s: expected a number above 0, got {self.release_s!r}")
        if self.gripper_closed not in ("high", "low"):
            raise ValueError(f"operator.gripper_closed: expected high or low, got {self.gripper_closed!r}")


class HandOperator(Intervention):
    """Answers `interventions.base.Intervention` for any HandDevice."""

    is_person = True

    def __init__(self, device: HandDevice, spec: TaskSpec, axes: Collection[str], settings: HandSettings):
        self._device, self._spec, self._settings = device, spec, settings
        self._low, self._high = np.float32(spec.action_low), np.float32(spec.action_high)
        self._places = {name: spec.action_names.index(name) for name in axes}
        self._targets = spec.target_dims  # action place -> state place
        self._gripper = _gripper_of(spec, settings, axes)
        self._step = spec.full_moves() * settings.share
        self.vocabulary = tuple(word for word in WORDS if word in device.commands)
        self._begin(from_start=False)

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Forget what was pressed; a demonstration is the person's from its first tick."""
        self._device.pressed()
        self._begin(from_start)

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The person's action while they drive, the policy's otherwise."""
        self._listen()
        motion = self._device.motion()
        if not self._drives(any(motion.values())):
            self._driving = False
            action = propose()
            if self._gripper is not None:
                self._grip = float(action[self._gripper])
            return action, False
        if not self._driving:
            self._driving = True
            self._target = {action: float(observation.state[state]) for action, state in self._targets.items()}
        return self._action(motion, observation), True

    def words(self) -> Words:
        """What was said since the last call."""
        self._listen()
        said, self._said = self._said, NOTHING_SAID
        return said

    def missing(self) -> str | None:
        """Why the device cannot be used now; None: it is there."""
        return self._device.missing()

    def describe(self) -> Sequence[str]:
        """Keys or buttons, what they move, and what nothing moves."""
        driven = {*self._places.values(), *([] if self._gripper is None else [self._gripper])}
        idle = [name for place, name in enumerate(self._spec.action_names) if place not in driven]
        lines = [f"full deflection is {self._settings.share:g} of the action's limits"]
        if idle:
            lines.append(f"moved by nothing: {', '.join(idle)} (operator.axes)")
        return [*self._device.describe(), *lines]

    def close(self) -> None:
        """Let go of the device."""
        self._device.close()

    def _let_go(self) -> None:
        """Nobody holds the device: what was pressed to take over is over."""
        self._pinned, self._touched_at = False, -np.inf

    def _begin(self, from_start: bool) -> None:
        self._from_start, self._pinned, self._driving = from_start, False, False
        self._touched_at = -np.inf  # monotonic seconds
        self._grip: float | None = None  # the command in force; None: nobody gave one in this episode
        self._toggles = False  # the gripper key was pressed and is not obeyed yet
        self._target: dict[int, float] = {}
        self._said = NOTHING_SAID

    def _listen(self) -> None:
        for command in self._device.pressed():
            if command == "takeover":
                self._pinned, self._touched_at = not self._drives(touched=False), -np.inf
            elif command == "gripper":
                self._toggle_gripper()
            else:
                self._said = replace(self._said, **{command: True})

    def _drives(self, touched: bool) -> bool:
        now = time.monotonic()
        if touched and self._settings.touch:
            self._touched_at = now
        lately = now - self._touched_at < self._settings.release_s
        return self._from_start or self._pinned or lately or self._device.holds_takeover()

    def _toggle_gripper(self) -> None:
        if self._settings.touch:
            self._touched_at = time.monotonic()
        elif not self._drives(touched=False):
            return
        self._toggles = not self._toggles

    def _action(self, motion: Mapping[str, float], observation: Observation) -> np.ndarray:
        action = np.zeros(len(self._low), np.float64)
        for name, deflection in motion.items():
            place = self._places[name]
            action[place] = abs(deflection) * self._step[int(deflection > 0), place]
        for place, state in self._targets.items():
            action[place] = self._moved_target(place, float(observation.state[state]), action[place])
        if self._gripper is not None:
            action[self._gripper] = self._gripper_command(self._gripper)
        return np.clip(action, self._low, self._high).astype(np.float32)

    def _moved_target(self, place: int, sensed: float, step: float) -> float:
        lead = self._step[1, place] * _LEAD_S * self._spec.control_hz
        moved = self._target[place] + step
        if step:  # a robot that does not follow must not catch up later
            moved = float(np.clip(moved, sensed - lead, sensed + lead))
        self._target[place] = moved
        return moved

    def _gripper_command(self, place: int) -> float:
        """What it was told last, or is; the other end when the key was pressed."""
        low, high = float(self._low[place]), float(self._high[place])
        opened, closed = (low, high) if self._settings.gripper_closed == "high" else (high, low)
        now = self._target.get(place, opened) if self._grip is None else self._grip
        if self._toggles:
            self._toggles, now = False, opened if abs(now - closed) < abs(now - opened) else closed
        self._grip = now
        return now


def usable_axes(axes: Mapping[str, object] | None, spec: TaskSpec) -> list[str]:
    """The names of `operator.axes` that this task has; ValueError: one that is neither the task's nor a usual one."""
    names = [name for name in axes or {} if name in spec.action_names]
    for name in axes or {}:
        if name not in spec.action_names and name not in USUAL_AXES:
            raise ValueError(
                f"operator.axes.{name}: expected an action of the task ({', '.join(spec.action_names)}), "
                f"got {name!r}{nearest(name, spec.action_names)}"
            )
    if not names:
        raise ValueError(
            f"operator.axes: none of {', '.join(axes or {}) or 'nothing'} is an action of the task "
            f"({', '.join(spec.action_names)}); name its actions in operator.axes"
        )
    return names


def check_commands(bound: Mapping[str, object | None], key: str) -> dict[str, object]:
    """The commands that have a key or a button; ValueError for an unknown command, or two on one button."""
    for command in bound:
        if command not in COMMANDS:
            raise ValueError(f"{key}.{command}: unknown command{nearest(command, COMMANDS)}")
    given = {command: what for command, what in bound.items() if what is not None}
    for what, times in Counter(given.values()).items():
        if times > 1:
            both = " and ".join(f"{key}.{command}" for command in given if given[command] == what)
            raise ValueError(f"{both}: expected different ones, got {what!r} twice")
    return given


def rescaled(value: float, deadband: float) -> float:
    """A deflection in [-1, 1] with nothing within the deadband, and without a step at its edge.

    >>> rescaled(0.1, 0.1), rescaled(-1.0, 0.1)
    (0.0, -1.0)
    """
    beyond = max(0.0, min(1.0, abs(value)) - deadband) / (1.0 - deadband)
    return beyond if value > 0 else -beyond if beyond else 0.0


def _gripper_of(spec: TaskSpec, settings: HandSettings, axes: Collection[str]) -> int | None:
    name = settings.gripper
    if name == "auto":
        name = next((usual for usual in USUAL_GRIPPERS if usual in spec.action_names and usual not in axes), None)
    if name is None:
        return None
    if name not in spec.action_names or name in axes:
        free = [action for action in spec.action_names if action not in axes]
        raise ValueError(f"operator.gripper: expected auto, null or one of {', '.join(free)}, got {name!r}")
    return spec.action_names.index(name)


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"operator.{key}: expected a number, got {value!r}")
    return value
