"""Between whoever drives and the robot: finite check, absolute limits, speed limits, workspace box, in this order.

Called by the actor loop for every action, human or policy; what comes out is what is executed and what is recorded.
The limits bend an action; a non-finite number stops the episode, since no safe meaning can be given to it.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from serl_transport.schema import Observation
from serl_transport.specs import TaskSpec

Filter = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(action float32[ad], state float32[s]) -> action float32[ad]."""


class UnsafeTickError(Exception):
    """This tick must not be executed or recorded; the robot holds and the episode ends here."""


class SafetyChain:
    """The chain for one task.

    Args:
        spec: names, limits and control rate.
        max_speed: action name -> largest |value| per second, for actions that are displacements per tick.
        workspace: state name -> {low, high, action}: the named action, a displacement of that state, never carries it
            further out of [low, high].

    Raises:
        ValueError: a name that the task does not have.
    """

    def __init__(
        self,
        spec: TaskSpec,
        max_speed: Mapping[str, float] | None = None,
        workspace: Mapping[str, Mapping] | None = None,
    ):
        self._spec = spec
        self._filters: list[Filter] = [absolute_limits(spec)]
        if max_speed:
            self._filters.append(speed_limits(spec, max_speed))
        for name, box in (workspace or {}).items():
            self._filters.append(workspace_box(spec, name, **box))

    def check_observation(self, observation: Observation) -> None:
        """UnsafeTickError naming the camera, key or dim that does not fit the task or is not finite."""
        try:
            self._spec.check_observation(observation)
        except ValueError as error:
            raise UnsafeTickError(f"observation: {error}") from None

    def filter(self, action: np.ndarray, state: np.ndarray, source: str) -> np.ndarray:
        """The float32[ad] to execute; UnsafeTickError, naming the source, when it is not finite or misshapen."""
        action = np.asarray(action, np.float32)
        try:
            self._spec.check_action(action)
        except ValueError as error:
            raise UnsafeTickError(f"{source}: {error}") from None
        for bend in self._filters:
            action = bend(action, state)
        return action


def absolute_limits(spec: TaskSpec) -> Filter:
    """Clip to the task's action limits."""
    low, high = np.asarray(spec.action_low, np.float32), np.asarray(spec.action_high, np.float32)
    return lambda action, state: np.clip(action, low, high)


def speed_limits(spec: TaskSpec, max_speed: Mapping[str, float]) -> Filter:
    """Clip displacements per tick to `max_speed` per second."""
    limit = np.full(spec.action_dim, np.inf, np.float32)
    for name, speed in max_speed.items():
        if speed <= 0:
            raise ValueError(f"max_speed.{name}: expected a number above 0, got {speed}")
        limit[_index(spec.action_names, name, "max_speed")] = speed / spec.control_hz
    return lambda action, state: np.clip(action, -limit, limit)


def workspace_box(spec: TaskSpec, name: str, low: float, high: float, action: str) -> Filter:
    """Keep state `name` within [low, high]; from outside only moves that do not lead further out remain."""
    if not low < high:
        raise ValueError(f"workspace.{name}: low {low} must be below high {high}")
    where, moves = (
        _index(spec.state_names, name, "workspace"),
        _index(spec.action_names, action, f"workspace.{name}.action"),
    )

    def bend(command: np.ndarray, state: np.ndarray) -> np.ndarray:
        bent = command.copy()
        bent[moves] = np.clip(bent[moves], min(low - state[where], 0.0), max(high - state[where], 0.0))
        return bent

    return bend


def _index(names: Sequence[str], name: str, key: str) -> int:
    if name not in names:
        raise ValueError(f"{key}: expected one of {', '.join(names)}, got {name!r}")
    return list(names).index(name)
