"""Between whoever drives and the robot: finite check, absolute limits, velocity and acceleration limits, workspace box.

Called by the actor loop for every action, human or policy; what comes out is what is sent and what is recorded. The
limits bend an action; a non-finite number stops the episode, since no safe meaning can be given to it.

    action ─▶ finite? ─▶ absolute ─▶ velocity ─▶ acceleration ─▶ absolute ─▶ workspace box ─▶ send
                 └ UnsafeTickError          └ against what was sent before
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from serl_config.nearest import nearest
from serl_robot_infra.envs.base import StepResult
from serl_transport.contract.bounds import LARGEST_REWARD
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

LEAD_S = 0.5
"""How far a target may be ahead of what is sensed, in seconds of max_speed. A servo that follows lags by less."""


@dataclass(frozen=True, slots=True)
class Tick:
    """What a limit may look at."""

    state: np.ndarray  # float32[s], sensed now
    origin: np.ndarray  # float32[ad], from where an action is a displacement: 0; of a target dim `SafetyChain._origin`
    last_move: np.ndarray  # float32[ad], displacement that was sent at the tick before; 0 when the robot stood


Limit = Callable[[np.ndarray, Tick], np.ndarray]
"""(action float32[ad], tick) -> action float32[ad]."""


class UnsafeTickError(Exception):
    """This tick must not be executed or recorded; the robot holds and the episode ends here."""


class SafetyChain:
    """The chain for one task.

    Args:
        spec: names, limits and control rate.
        max_speed: action name -> largest |velocity|, units per second.
        max_acceleration: action name -> largest |change of velocity|, units per second squared.
        workspace: state name -> {low, high, action}: the named action never carries that state further out of
            [low, high].

    Actions that the spec's `targets` names are target positions of a state; all others are displacements per tick.

    Raises:
        ValueError: a name that the task does not have, or a limit that is not above 0.
    """

    def __init__(
        self,
        spec: TaskSpec,
        max_speed: Mapping[str, float] | None = None,
        max_acceleration: Mapping[str, float] | None = None,
        workspace: Mapping[str, Mapping] | None = None,
    ):
        self._spec = spec
        self._targets = spec.target_dims
        self._lead = _per_action(spec, max_speed or {}, "max_speed") * LEAD_S
        self._limits: list[Limit] = [absolute_limits(spec)]
        if max_speed:
            self._limits.append(speed_limits(spec, max_speed))
        if max_acceleration:
            self._limits += [acceleration_limits(spec, max_acceleration), no_further_out(spec)]
        for name, box in (workspace or {}).items():
            self._limits.append(workspace_box(spec, name, **box))
        self._sent: np.ndarray | None = None
        self._last_move = np.zeros(spec.action_dim, np.float32)

    @staticmethod
    def of(spec: TaskSpec, section: Any) -> "SafetyChain":
        """From `task.safety` of the yaml; ValueError names a key that is unknown, missing or no number."""
        section = _mapping(section, "task.safety")
        if "targets" in section:
            raise ValueError("task.safety.targets: say it in task.spec.targets, which the learner reads as well")
        checks = {"max_speed": _check_number, "max_acceleration": _check_number, "workspace": _check_box}
        _check_keys(section, tuple(checks), "task.safety")
        for key, check in checks.items():
            for name, value in _mapping(section.get(key), f"task.safety.{key}").items():
                check(value, f"task.safety.{key}.{name}")
        try:
            return SafetyChain(spec, **section)
        except ValueError as mistake:
            raise ValueError(f"task.safety.{mistake}") from None

    def reset(self) -> None:
        """The robot stands still: an episode begins, or it held."""
        self._sent = None
        self._last_move = np.zeros(self._spec.action_dim, np.float32)

    def check_observation(self, observation: Observation) -> None:
        """UnsafeTickError naming the camera, key or dim that does not fit the task or is not finite."""
        try:
            self._spec.check_observation(observation)
        except ValueError as error:
            raise UnsafeTickError(f"observation: {error}") from None

    def check_result(self, result: StepResult) -> StepResult:
        """The tick's result with a plain float and plain bools; no later reader could take another one.

        UnsafeTickError as `check_observation` and for a reward that is NaN or absurd; ValueError for a reward that is
        no number and a flag that is neither true nor false, which the next tick would not mend.
        """
        flags = {name: _flag(name, getattr(result, name)) for name in ("terminated", "truncated", "success")}
        given = result.reward
        if isinstance(given, np.ndarray) and not given.ndim:
            given = given.item()
        if isinstance(given, bool | np.bool_) or not isinstance(given, Real):
            raise ValueError(f"a tick's reward: expected a number, got {given!r}")
        reward = float(given)
        if not -LARGEST_REWARD <= reward <= LARGEST_REWARD:
            raise UnsafeTickError(f"reward: expected {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}, got {reward:g}")
        self.check_observation(result.observation)
        return replace(result, reward=reward, **flags)

    def filter(self, action: np.ndarray, state: np.ndarray, source: str) -> np.ndarray:
        """The float32[ad] to send, which the next tick's limits take for sent.

        Raises UnsafeTickError, naming the source, when the action is not finite or misshapen.
        """
        action = np.asarray(action, np.float32)
        try:
            self._spec.check_action(action)
        except ValueError as error:
            raise UnsafeTickError(f"{source}: {error}") from None
        tick = Tick(state, self._origin(state), self._last_move)
        for limit in self._limits:
            action = limit(action, tick)
        self._sent, self._last_move = action, action - tick.origin
        return action

    def executed(self, action: np.ndarray) -> np.ndarray:
        """What the driver made of the action sent last, float32[ad]: it is what the next tick's limits start from.

        UnsafeTickError when it is not finite or misshapen.
        """
        action = np.asarray(action, np.float32)
        try:
            self._spec.check_action(action)
        except ValueError as error:
            raise UnsafeTickError(f"executed: {error}") from None
        assert self._sent is not None, "executed before filter"
        self._sent, self._last_move = action, self._last_move + (action - self._sent)
        return action

    def _origin(self, state: np.ndarray) -> np.ndarray:
        """A target moves on from the one sent before, so that it never jumps, whoever drives from now on. But a robot
        that does not follow (it is blocked, it was pushed) is not left with a target far away, to which it would shoot
        once it is free, in whoever's hands: no further than LEAD_S of max_speed from what is sensed.
        """
        origin = np.zeros(self._spec.action_dim, np.float32)
        for action, sensed in self._targets.items():
            at, lead = state[sensed], self._lead[action]
            origin[action] = at if self._sent is None else np.clip(self._sent[action], at - lead, at + lead)
        return origin


def describe(section: Mapping[str, Any] | None, targets: Mapping[str, str]) -> str:
    """`task.safety` and `task.spec.targets` in one line, for the actor's start."""
    limits = section or {}
    parts = [_listed(key, limits[key]) for key in limits if limits[key]]
    text = f"safety limits: {'; '.join(parts)}" if parts else (
        "no safety limits beside action_low and action_high: task.safety is not set"
    )  # fmt: skip
    if targets:
        text += "; " + _listed("targets", targets)
    if unbounded := [name for name in targets if name not in (limits.get("max_speed") or {})]:
        text += f"; nothing bounds the step of a target without max_speed, not at a hand-over: {', '.join(unbounded)}"
    return text


def _listed(key: str, limits: Mapping[str, Any]) -> str:
    return f"{key} {', '.join(f'{name} {_shown(value)}' for name, value in limits.items())}"


def absolute_limits(spec: TaskSpec) -> Limit:
    """Clip to the task's action limits."""
    low, high = np.asarray(spec.action_low, np.float32), np.asarray(spec.action_high, np.float32)
    return lambda action, tick: np.clip(action, low, high)


def speed_limits(spec: TaskSpec, max_speed: Mapping[str, float]) -> Limit:
    """No displacement above `max_speed` per second."""
    step = _per_action(spec, max_speed, "max_speed") / spec.control_hz
    return lambda action, tick: tick.origin + np.clip(action - tick.origin, -step, step)


def acceleration_limits(spec: TaskSpec, max_acceleration: Mapping[str, float]) -> Limit:
    """No displacement that differs from the one before by more than `max_acceleration` allows in a tick."""
    change = _per_action(spec, max_acceleration, "max_acceleration") / spec.control_hz**2

    def bend(action: np.ndarray, tick: Tick) -> np.ndarray:
        move = np.clip(action - tick.origin, tick.last_move - change, tick.last_move + change)
        return (tick.origin + move).astype(np.float32)

    return bend


def no_further_out(spec: TaskSpec) -> Limit:
    """The absolute limits outrank the acceleration: a target that comes to its limit at speed stops there.

    An arm that stands outside is led back as fast as the other limits allow, and no further out.
    """
    low, high = np.asarray(spec.action_low, np.float32), np.asarray(spec.action_high, np.float32)
    return lambda action, tick: np.clip(action, np.minimum(low, tick.origin), np.maximum(high, tick.origin))


def workspace_box(spec: TaskSpec, name: str, low: float, high: float, action: str) -> Limit:
    """Keep state `name` within [low, high]; from outside only moves that do not lead further out remain."""
    if not low < high:
        raise ValueError(f"workspace.{name}: low {low} must be below high {high}")
    where = _index(spec.state_names, name, "workspace")
    moves = _index(spec.action_names, action, f"workspace.{name}.action")
    absolute = moves in spec.target_dims

    def bend(command: np.ndarray, tick: Tick) -> np.ndarray:
        at, bent = tick.state[where], command.copy()
        if absolute:
            bent[moves] = np.clip(bent[moves], min(low, at), max(high, at))
        else:
            bent[moves] = np.clip(bent[moves], min(low - at, 0.0), max(high - at, 0.0))
        return bent

    return bend


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_ | Real) or value not in (0, 1):
        raise ValueError(f"a tick's {name}: expected true or false, got {value!r}")
    return bool(value)


def _per_action(spec: TaskSpec, limits: Mapping[str, float], key: str) -> np.ndarray:
    """float32[ad] of limits, infinite where none is given."""
    values = np.full(spec.action_dim, np.inf, np.float32)
    for name, value in limits.items():
        if value <= 0:
            raise ValueError(f"{key}.{name}: expected a number above 0, got {value}")
        values[_index(spec.action_names, name, key)] = value
    return values


def _index(names: Sequence[str], name: str, key: str) -> int:
    if name not in names:
        raise ValueError(f"{key}: expected one of {', '.join(names)}, got {name!r}")
    return list(names).index(name)


def _shown(limit: Any) -> str:
    if isinstance(limit, Mapping):
        return f"{limit['low']:g} to {limit['high']:g} (by {limit['action']})"
    return f"{limit:g}" if isinstance(limit, int | float) else f"follows {limit}"


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping of names, got {value!r}")
    return value


def _check_keys(section: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in section:
        if key not in known:
            raise ValueError(f"{where}.{key}: unknown key{nearest(str(key), known)}")


def _check_box(box: Any, where: str) -> None:
    if not isinstance(box, Mapping):
        raise ValueError(f"{where}: expected {{low, high, action}}, got {box!r}")
    _check_keys(box, ("low", "high", "action"), where)
    for key in ("low", "high", "action"):
        if key not in box:
            raise ValueError(f"{where}: missing key {key!r}; expected {{low, high, action}}")
    _check_number(box["low"], f"{where}.low")
    _check_number(box["high"], f"{where}.high")
    _check_text(box["action"], f"{where}.action")


def _check_number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: expected a number, got {value!r}")


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a name, got {value!r}")
