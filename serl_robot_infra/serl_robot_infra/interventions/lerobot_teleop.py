"""Any LeRobot teleoperator as the operator, by yaml: `task.operator.teleop` is LeRobot's own config.

    leader arm:         takeover key ─▶ the arm goes to the leader at match_speed ─▶ follows it, until the key again
    gamepad, keyboard:  its own buttons say who drives (is_intervention), success, failure, once more (TeleopEvents)

Called by the actor loop at every tick. Actions are matched by name; `axes` renames and scales them. A device that does
not answer raises PartLostError, and is opened anew when it is asked next.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from serl_config.nearest import nearest
from serl_robot_infra import lerobot_devices as devices
from serl_robot_infra.envs.base import Environment, PartLostError
from serl_robot_infra.interventions.base import Intervention, Words
from serl_robot_infra.interventions.matching import Matching
from serl_robot_infra.keyboard import terminal_keyboard
from serl_transport.contract.schema import Observation

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Axis:
    """One action out of the device's: `scale` × value + `offset`, in the task's units."""

    key: str  # the device's name
    scale: float = 1.0
    offset: float = 0.0
    keep: float | None = None  # the device's value that means: as before (a gripper that stays)


class LeRobotTeleop(Intervention):
    """Answers `interventions.base.Intervention`.

    Args:
        env: the environment that it drives.
        teleop: LeRobot's config: `type`, port, `id` of the calibration.
        axes: action name -> {key, scale, offset, keep} for a device with other names or units; None: the same names.
        takeover_key: takes over and lets go, for a device without buttons; the actor's terminal.
        match_speed: of the arm towards the leader before it follows it, units per second; match_tolerance: how near
            each joint must be to follow it, units.

    Raises ValueError for a name, key or unit that does not fit and for a missing calibration; OSError for a device that
    does not answer; ImportError for a driver that is not installed.
    """

    def __init__(
        self,
        env: Environment,
        teleop: Mapping[str, Any],
        axes: Mapping[str, Mapping[str, Any]] | None = None,
        takeover_key: str = "enter",
        match_speed: float = 20.0,
        match_tolerance: float = 3.0,
    ):
        self._spec = env.spec
        self._node = devices.plain(teleop)
        self._device = devices.make_teleoperator(self._node)
        self._axes = _axes(self._spec.action_names, devices.feature_names(self._device.action_features), axes)
        self._matching = Matching(
            _joints(self._axes, self._spec.state_names),
            _positive("match_speed", match_speed) / self._spec.control_hz,
            _positive("match_tolerance", match_tolerance), self._spec.action_names, self._spec.control_hz,
        )  # fmt: skip
        _check_units(env, self._device)
        self._takeover_key = takeover_key
        self._switched = self._from_start = self._lost = False
        self._last = np.zeros(len(self._axes), np.float32)
        self._events: dict[str, bool] = {}
        self._asked = False
        devices.connect(self._device, self._node, "teleop", drives=False)
        self._has_buttons = devices.events_of(self._device) is not None
        if not self._has_buttons:
            self._listen()
        self.reset(np.random.default_rng(0), from_start=False)

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Begin an episode: the policy drives, in a demonstration the operator."""
        self._from_start, self._switched = from_start, False
        self._matching.forget()
        self._events = {}
        self._last[:] = 0.0

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The device's action while the operator drives, the policy's else. PartLostError: it does not answer."""
        wish = self._wish() if self._has_buttons or self._drives() else None
        if wish is None or not self._drives():
            self._matching.forget()
            return propose(), False
        return self._matching.toward(wish, observation.state), True

    def words(self) -> Words:
        """LeRobot's TeleopEvents; a device without buttons says nothing, nor one that does not answer."""
        if self._has_buttons and not self._asked:  # between episodes nobody asks for actions
            try:
                with self._part():
                    self._hear()
            except PartLostError as lost:  # the next `act` ends the episode
                log.warning("%s", lost)
        self._asked = False
        said, self._events = self._events, {}
        again, success = said.get("rerecord_episode", False), said.get("success", False)
        ended = said.get("failure", False) or said.get("terminate_episode", False)
        return Words(success=success and not again, failure=ended and not success and not again, discard=again)

    def describe(self) -> Sequence[str]:
        """What the device can do."""
        if self._has_buttons:
            return (
                f"{self._node['type']}: its own buttons take over, say success and failure, and ask for another try",
            )
        return (f"{self._takeover_key}: take over with the {self._node['type']}, let go",)

    def close(self) -> None:
        """Let go of the device."""
        if self._device.is_connected:
            try:
                self._device.disconnect()
            except devices.FAULTS as fault:
                log.warning("%s: not closed properly: %s", self._node["type"], devices.one_line(fault))

    def _listen(self) -> None:
        keyboard = terminal_keyboard()
        if keyboard is None:
            log.warning(
                "%s has no buttons and this actor no terminal: it drives demonstrations only", self._node["type"]
            )
        else:
            keyboard.on(self._takeover_key, self._switch, "task.operator.takeover_key")

    def _switch(self) -> None:
        self._switched = not self._switched

    def _drives(self) -> bool:
        return self._from_start or self._switched or self._events.get("is_intervention", False)

    def _wish(self) -> np.ndarray:
        """float32[ad], what the device asks for, in the task's units."""
        with self._part():
            raw = self._device.get_action()
            if self._has_buttons:
                self._hear()
        for index, axis in enumerate(self._axes):
            value = float(raw[axis.key])
            if axis.keep is None or value != axis.keep:
                self._last[index] = axis.scale * value + axis.offset
        return self._last.copy()

    def _hear(self) -> None:
        """Ask the buttons; a word stays until it is passed on, who drives is as of now."""
        said = devices.events_of(self._device) or {}
        before = {name for name, was in self._events.items() if was and name != "is_intervention"}
        self._events = {name: now or name in before for name, now in said.items()}
        self._asked = True

    @contextmanager
    def _part(self) -> Iterator[None]:
        try:
            if self._lost:
                devices.mend(self._device, drives=False)
                devices.mend_whole(self._device, self._node, "teleop", drives=False)
                self._lost = False
            yield
        except devices.FAULTS as fault:
            self._lost = True
            raise PartLostError(f"{self._node['type']}: {devices.one_line(fault)}") from fault


def _axes(actions: Sequence[str], keys: Sequence[str], axes: Mapping[str, Mapping[str, Any]] | None) -> list[Axis]:
    """One axis an action, in the task's order; ValueError for a name that either side does not have."""
    given = devices.plain(axes) if axes is not None else {name: {"key": name} for name in actions}
    for name in given:
        if name not in actions:
            raise ValueError(f"task.operator.axes.{name}: the task has no such action{nearest(name, actions, show=40)}")
    found = []
    for name in actions:
        if name not in given:
            raise ValueError(f"task.operator.axes: the action {name!r} is missing; {{key: <{', '.join(keys)}>}}")
        try:
            axis = Axis(**given[name])
        except TypeError as error:
            raise ValueError(f"task.operator.axes.{name}: expected key, scale, offset, keep: {error}") from None
        if axis.key not in keys:
            hint = nearest(str(axis.key), keys, show=40)
            raise ValueError(f"task.operator.axes.{name}: the teleoperator has no {axis.key!r}{hint}")
        found.append(axis)
    return found


def _joints(axes: Sequence[Axis], states: Sequence[str]) -> list[tuple[int, int]]:
    """(action, state) of each joint that the leader has as well: only these can be matched before it drives."""
    joints = []
    for index, axis in enumerate(axes):
        if axis.key.endswith(".pos"):
            if axis.key not in states:
                raise ValueError(
                    f"task.spec.state_names: {axis.key!r} is missing; the leader is matched to the arm before it drives"
                )
            joints.append((index, list(states).index(axis.key)))
    return joints


def _check_units(env: Environment, device: Any) -> None:
    """A leader in degrees would make an arm in −100..100 jump."""
    theirs, ours = getattr(env, "uses_degrees", None), devices.uses_degrees(device)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(
            f"task.operator.teleop.use_degrees: expected {str(theirs).lower()} as in task.env.robot, got "
            f"{str(ours).lower()}"
        )


def _positive(key: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"task.operator.{key}: expected a number above 0, got {value}")
    return float(value)
