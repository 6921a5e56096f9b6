"""The X-Trainer's leader arms as the operator: Dynamixel servos on a serial line an arm, two buttons on each.

    button A: takes over ─▶ the robot goes to the leaders at match_speed ─▶ they are free, the robot follows
    button A again, or the policy drives:  the leaders are locked where they stand; button A, long: free, locked again
    a thread an arm:  positions and buttons, a hundred times a second ─▶ `act`, `words` never wait

Called by the actor loop at every tick. Ids, signs, offsets and the buttons' message (AA 55 AA, answered by a byte and
its complement; a nibble a button, 0 while it is pressed) are those of the X-Trainer's client: `dobot_settings.ini`
holds the numbers of each pair. No class of LeRobot's reads these servos: eight on a line, two of them on one joint.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from serl_config.nearest import nearest
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.interventions.base import WORDS, Intervention, OperatorGoneError, Words
from serl_robot_infra.interventions.dobot_leader_arm import LeaderArm, LeaderSettings
from serl_robot_infra.interventions.hand import MEANINGS
from serl_robot_infra.interventions.matching import Matching
from serl_transport.contract.schema import Observation

_MEANINGS = {**MEANINGS, "free": "free the leaders where they do not drive, lock them"}


class DobotLeader(Intervention):
    """Answers `interventions.base.Intervention`.

    Args:
        env: joint control of the same arms.
        arms: name -> the keys of `LeaderSettings`.
        buttons: what is meant -> a button or several: `<arm>_a`, `<arm>_b`, `<arm>_a_long`, `<arm>_b_long` (held for
            0.8 s); takeover, free (to put the leaders somewhere while they do not drive), success, failure, discard,
            ready, stop; null: none.
        match_speed: rad per second; match_tolerance: rad, each joint.
        max_age_ms: an older position is a lost leader.

    Raises ValueError for names or keys that do not fit, OSError for a leader that does not answer.
    """

    is_person = True

    def __init__(
        self,
        env: Environment,
        arms: Mapping[str, Mapping[str, Any]],
        buttons: Mapping[str, Any],
        match_speed: float = 0.3,
        match_tolerance: float = 0.06,
        max_age_ms: float = 150.0,
    ):
        self._names, spec = list(env.spec.action_names), env.spec
        plain = OmegaConf.to_container(OmegaConf.create({"arms": arms, "buttons": buttons}), resolve=True)
        self._rows = {name: _rows(name, self._names) for name in plain["arms"]}
        _check_complete(self._rows, self._names)
        joints = [(row, _state(self._names[row], spec.state_names)) for rows in self._rows.values() for row in rows[:6]]
        self._columns = dict(joints)
        self._matching = Matching(
            joints, _positive("match_speed", match_speed) / spec.control_hz,
            _positive("match_tolerance", match_tolerance), self._names, spec.control_hz,
        )  # fmt: skip
        self._max_age_s = _positive("max_age_ms", max_age_ms) / 1e3
        self._meanings = _meanings(plain["buttons"], plain["arms"])
        self.vocabulary = tuple(word for word in WORDS if word in self._meanings.values())
        self._arms = {
            name: LeaderArm(_settings(name, node), partial(self._pressed, name)) for name, node in plain["arms"].items()
        }
        self._from_start = self._switched = self._drives = self._unlocked = False
        self._said: deque[str] = deque()  # filled by the arms' threads
        self._last: np.ndarray | None = None  # float32[ad], the wish of the tick before
        self._open()

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Begin an episode: the policy drives, in a demonstration the leaders."""
        self._from_start, self._switched, self._unlocked = from_start, False, False
        self._said.clear()
        self._rest()

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The leaders' joints while they drive, the policy's else. OperatorGoneError: a leader does not answer."""
        if not (self._from_start or self._switched):
            self._rest()
            return propose(), False
        self._drives = True
        if (reason := self.missing()) is not None:
            raise OperatorGoneError(reason)
        action = self._matching.toward(self._wish(observation.state), observation.state)
        self._unlocked = False
        self._free(self._matching.matched)
        return action, True

    def words(self) -> Words:
        """What the buttons said."""
        said = {self._said.popleft() for _ in range(len(self._said))}
        return Words(**{word: word in said for word in WORDS})

    def describe(self) -> Sequence[str]:
        """A line for each button."""
        return [
            f"{button.replace('_', ' ')} button: {_MEANINGS[meaning]}" for button, meaning in self._meanings.items()
        ]

    def missing(self) -> str | None:
        """Why the leaders cannot be used now."""
        for name, arm in self._arms.items():
            if (reason := arm.missing(self._max_age_s)) is not None:
                return f"{name} leader: {reason}"
        return None

    def close(self) -> None:
        """The leaders are locked where they stand."""
        for arm in self._arms.values():
            arm.close()

    def _open(self) -> None:
        for name, arm in self._arms.items():
            if not Path(arm.port).exists():
                raise ConnectionError(f"task.operator: {name} leader: {arm.port}: no such port")
        for arm in self._arms.values():
            arm.start()
        deadline = time.monotonic() + 2.0
        while (reason := self.missing()) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        if reason is not None:
            self.close()
            raise ConnectionError(f"task.operator: {reason}")

    def _rest(self) -> None:
        self._matching.forget()
        self._last, self._drives = None, False
        self._free(self._unlocked)

    def _free(self, free: bool) -> None:
        for arm in self._arms.values():
            arm.free = free

    def _pressed(self, arm: str, press: str) -> None:
        """In the thread of that arm."""
        meaning = self._meanings.get(f"{arm}_{press}")
        if meaning == "takeover":
            self._switched = not self._switched
        elif meaning == "free":
            self._unlocked = not self._unlocked and not self._drives
            if not self._drives:
                self._free(self._unlocked)
        elif meaning is not None:
            self._said.append(meaning)

    def _wish(self, state: np.ndarray) -> np.ndarray:
        """float32[ad]. A leader does not count whole turns: of each joint the value nearest to where it was, at first
        to where the robot is.
        """
        wish = np.zeros(len(self._names), np.float32)
        for name, rows in self._rows.items():
            joints, grip = self._arms[name].sensed()
            near = [state[self._columns[row]] if self._last is None else self._last[row] for row in rows[:6]]
            wish[rows[:6]] = near + (joints - near + np.pi) % (2 * np.pi) - np.pi
            wish[rows[6:]] = grip
        self._last = wish
        return wish.copy()


def _rows(arm: str, names: Sequence[str]) -> list[int]:
    """Of the six joints, and of the gripper where the robot has one."""
    wanted = [f"{arm}_joint{number}" for number in range(1, 7)]
    if missing := [name for name in wanted if name not in names]:
        hint = nearest(missing[0], names, show=40)
        raise ValueError(f"task.operator.arms.{arm}: the task has no action {missing[0]!r}{hint}")
    return [names.index(name) for name in (*wanted, f"{arm}_gripper") if name in names]


def _check_complete(rows: Mapping[str, Sequence[int]], names: Sequence[str]) -> None:
    covered = {row for part in rows.values() for row in part}
    if left := [name for row, name in enumerate(names) if row not in covered]:
        raise ValueError(f"task.operator.arms: no leader moves {left[0]!r}")


def _state(name: str, states: Sequence[str]) -> int:
    if name not in states:
        raise ValueError(
            f"task.spec.state_names: {name!r} is missing; a leader is matched to the robot before it drives"
        )
    return list(states).index(name)


def _meanings(buttons: Mapping[str, Any], arms: Sequence[str]) -> dict[str, str]:
    """button -> what it means; ValueError for a button that is not there or is named twice."""
    known = [f"{arm}_{press}" for arm in arms for press in ("a", "b", "a_long", "b_long")]
    meanings: dict[str, str] = {}
    for meaning, named in buttons.items():
        if meaning not in (known_meanings := ("takeover", "free", *WORDS)):
            raise ValueError(f"task.operator.buttons.{meaning}: unknown{nearest(meaning, known_meanings)}")
        for button in [named] if isinstance(named, str) else named or []:
            if button not in known:
                raise ValueError(f"task.operator.buttons.{meaning}: no button {button!r}{nearest(button, known)}")
            if button in meanings:
                raise ValueError(f"task.operator.buttons.{meaning}: {button} is {meanings[button]} already")
            meanings[button] = meaning
    return meanings


def _settings(name: str, node: Mapping[str, Any]) -> LeaderSettings:
    try:
        return LeaderSettings(**node)
    except (TypeError, ValueError) as mistake:
        raise ValueError(f"task.operator.arms.{name}: {mistake}") from None


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise ValueError(f"task.operator.{key}: expected a number above 0, got {value!r}")
    return float(value)
