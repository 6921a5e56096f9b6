"""What a task's observations and actions look like: the contract that actor and learner must share.

Both sides compose a `TaskSpec` from the task yaml; the handshake compares them with `differences`. Environments and
policies check single observations and actions with it, the gateway checks whole step batches (`schema.py`).
"""

import contextlib
import difflib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from dataclasses import field as with_default
from types import MappingProxyType
from typing import Any

import numpy as np

from serl_transport.contract.bounds import (
    INT32,
    LARGEST,
    NAME_BYTES,
    PROMPT_CHARACTERS,
    check_name,
    check_text,
    check_whole,
    shown,
)
from serl_transport.contract.packed import Packed

HIGHEST_HZ = 10_000
SWEEP_S = 5.0
"""At its full move a target position crosses its range in so long."""


def new_boot_id(after: str = "") -> str:
    """A name for this process that no other process has; names sort by start time, and behind `after` at any rate."""
    started = time.time_ns()
    with contextlib.suppress(ValueError):  # an older release's name
        started = max(started, int(after.partition("-")[0], 16) + 1)  # the clock may have been set back since
    return f"{started:016x}-{os.urandom(4).hex()}"


@dataclass(frozen=True, slots=True)
class Observation:
    """What the robot senses at one tick."""

    images: Mapping[str, np.ndarray]  # camera name -> uint8[h, w, 3]
    state: np.ndarray  # float32[s], physical units

    def kept(self) -> "Observation":
        """As it is now, for good: copies that nobody can write to, whatever becomes of its maker's arrays."""
        return Observation({camera: kept(image) for camera, image in self.images.items()}, kept(self.state))


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task's interface. Build it with `from_dict`, which validates; sizes: s state dims, ad action dims."""

    name: str  # the task's name, as in config/task/<name>.yaml
    prompt: str  # what the policy is told to do
    cameras: Mapping[str, tuple[int, int]]  # camera name -> (height, width) of its uint8[h, w, 3] images
    state_names: tuple[str, ...]  # s names of the state's dims
    state_low: tuple[float, ...]  # s lowest values, physical units; may be -inf
    state_high: tuple[float, ...]  # s highest values, physical units; may be +inf
    action_names: tuple[str, ...]  # ad names of the action's dims
    action_low: tuple[float, ...]  # ad lowest values, physical units, finite
    action_high: tuple[float, ...]  # ad highest values, physical units, finite
    control_hz: float  # ticks per second of the control loop
    max_ticks: int  # time limit of an episode
    targets: Mapping[str, str] = with_default(default_factory=dict)
    """Action name -> state name, for actions that are target positions of that state; the others are displacements per
    tick, or commands."""

    @property
    def state_dim(self) -> int:
        """s"""
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        """ad"""
        return len(self.action_names)

    @property
    def target_dims(self) -> dict[int, int]:
        """Place in the action -> place in the state, of `targets`."""
        return {self.action_names.index(a): self.state_names.index(s) for a, s in self.targets.items()}

    def full_moves(self) -> np.ndarray:
        """float64[2, ad], the full move of one tick down and up: a displacement's limits; of a target, the way that it
        goes when it crosses its range in SWEEP_S. A person at full deflection and noise are measured in it."""
        moves = np.array([self.action_low, self.action_high], np.float64)
        for place in self.target_dims:
            moves[:, place] = np.array([-1, 1]) * (moves[1, place] - moves[0, place]) / SWEEP_S / self.control_hz
        return moves

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TaskSpec":
        """Build and validate a spec from yaml or from the wire; ValueError names the offending key."""
        _check_keys(data, [field.name for field in fields(cls)], required_keys())
        spec = cls(
            name=check_name("task spec: name", data["name"]),
            prompt=check_text("task spec: prompt", data["prompt"], PROMPT_CHARACTERS),
            cameras=_cameras(data["cameras"]),
            state_names=_names("state_names", data["state_names"]),
            state_low=_numbers("state_low", data["state_low"]),
            state_high=_numbers("state_high", data["state_high"]),
            action_names=_names("action_names", data["action_names"]),
            action_low=_numbers("action_low", data["action_low"]),
            action_high=_numbers("action_high", data["action_high"]),
            control_hz=_positive("control_hz", data["control_hz"]),
            max_ticks=check_whole("task spec: max_ticks", _as_whole(data["max_ticks"]), 1, INT32),
            targets=_targets(data.get("targets"), data["action_names"], data["state_names"]),
        )
        if spec.control_hz > HIGHEST_HZ:
            raise ValueError(f"task spec: control_hz: expected at most {HIGHEST_HZ}, got {spec.control_hz:g}")
        _check_range("state", spec.state_names, spec.state_low, spec.state_high)
        _check_range("action", spec.action_names, spec.action_low, spec.action_high)
        if not np.isfinite(spec.action_low + spec.action_high).all():
            raise ValueError("task spec: action_low and action_high must be finite, they scale the policy's output")
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain dicts, lists and scalars; `from_dict` reads it back to an equal spec.

        Without targets it has no such key: journals and peers of earlier releases know none.
        """
        plain: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            plain[field.name] = list(value) if isinstance(value, tuple) else value
        plain["cameras"] = {name: list(size) for name, size in self.cameras.items()}
        plain["targets"] = dict(self.targets)
        return plain if self.targets else {key: value for key, value in plain.items() if key != "targets"}

    def differences(self, other: "TaskSpec", mine: str = "here", theirs: str = "there") -> list[str]:
        """One line per field that differs, with both values: `max_ticks: 60 <mine>, 80 <theirs>`. Empty when equal."""
        lines = []
        for field in fields(self):
            left, right = getattr(self, field.name), getattr(other, field.name)
            if field.name == "cameras":
                for camera in sorted(set(left) | set(right)):
                    if left.get(camera) != right.get(camera):
                        lines.append(
                            f"cameras.{camera}: {left.get(camera, 'absent')} {mine}, "
                            f"{right.get(camera, 'absent')} {theirs}"
                        )
            elif left != right:
                lines.append(f"{field.name}: {_plain(left)} {mine}, {_plain(right)} {theirs}")
        return lines

    def check_observation(self, observation: Observation) -> None:
        """Raise ValueError unless every camera's image is uint8[h, w, 3] and the state is finite float32[s]."""
        for camera, (height, width) in self.cameras.items():
            image = observation.images.get(camera)
            if image is None:
                raise ValueError(f"camera {camera!r}: no image; got cameras {sorted(observation.images)}")
            check_array(f"camera {camera!r}", image, np.uint8, (height, width, 3))
        extra = sorted(set(observation.images) - set(self.cameras))
        if extra:
            raise ValueError(f"camera {extra[0]!r} is not in task {self.name!r}, which has {sorted(self.cameras)}")
        check_array("state", observation.state, np.float32, (self.state_dim,))
        check_finite("state", observation.state, self.state_names, LARGEST)

    def check_action(self, action: np.ndarray) -> None:
        """Raise ValueError unless the action is finite float32[ad]; limits are the safety layer's business."""
        check_array("action", action, np.float32, (self.action_dim,))
        check_finite("action", action, self.action_names, LARGEST)


def required_keys() -> list[str]:
    """Those that a task spec may not leave out."""
    return [field.name for field in fields(TaskSpec) if field.default_factory is MISSING]


def kept(array: Any) -> Any:
    """A copy of an array that nobody can write to, in C order; what is no array, as it is: a check will name it."""
    if not isinstance(array, np.ndarray):
        return array
    copy = np.array(array, order="C")
    copy.flags.writeable = False
    return copy


def check_array(label: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError with expected and got unless `array` is of exactly this dtype and shape, packed or not."""
    wanted = f"{np.dtype(dtype).name}{list(shape)}"
    if not isinstance(array, np.ndarray | Packed):
        raise ValueError(f"{label}: expected {wanted}, got {type(array).__name__}")
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise ValueError(f"{label}: expected {wanted}, got {array.dtype.name}{list(array.shape)}")


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; of a few values it is cheaper than `isfinite(array).all()`."""
    return b"\0" not in np.isfinite(array).tobytes()


def check_finite(label: str, array: np.ndarray, names: Sequence[str], largest: float = np.inf) -> None:
    """Raise ValueError naming the first dim (last axis) of `array` that is NaN, infinite or beyond ±`largest`."""
    if not all_finite(array):
        wrong, wanted = ~np.isfinite(array), "a finite number"
    elif largest < np.inf and array.size and max(-array.min(), array.max()) > largest:
        wrong, wanted = np.abs(array) > largest, f"a number from {-largest:g} to {largest:g}"
    else:
        return
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = f" at tick {at[0]}" if len(at) > 1 else ""
    raise ValueError(f"{label} dim {names[at[-1]]!r}{where}: expected {wanted}, got {array[at]}")


def _check_keys(data: Mapping[str, Any], wanted: list[str], required: list[str]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"task spec: expected a mapping, got {type(data).__name__}")
    for key in data:
        if key not in wanted:
            close = difflib.get_close_matches(str(key), wanted, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the keys are {wanted}"
            raise ValueError(f"task spec: unknown key {shown(key)}{hint}")
    missing = [key for key in required if key not in data]
    if missing:
        raise ValueError(f"task spec: missing key {missing[0]!r}")


def _as_whole(value: Any) -> Any:
    """60.0 as 60; anything else as it is."""
    return int(value) if isinstance(value, np.integer | float) and float(value).is_integer() else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _positive(key: str, value: Any) -> float:
    if not _is_number(value) or not np.isfinite(value) or value <= 0:
        raise ValueError(f"task spec: {key}: expected a number above 0, got {shown(value)}")
    return float(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _cameras(value: Any) -> Mapping[str, tuple[int, int]]:
    if not isinstance(value, Mapping):  # none: a task of states alone
        raise ValueError(f"task spec: cameras: expected {{name: [height, width]}}, got {shown(value)}")
    for camera, size in value.items():
        if "." in check_name("task spec: cameras", camera):
            raise ValueError(f"task spec: cameras: a camera's name is a text without dots, got {shown(camera)}")
        if not _is_list(size) or len(size) != 2 or not all(isinstance(n, int) and 0 < n <= 8192 for n in size):
            raise ValueError(f"task spec: cameras.{camera}: expected [height, width] in pixels, got {shown(size)}")
    return MappingProxyType({camera: (int(size[0]), int(size[1])) for camera, size in value.items()})


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not _is_list(value) or not len(value):
        raise ValueError(f"task spec: {key}: expected a list of names, got {shown(value)}")
    for name in value:
        check_text(f"task spec: {key}: a name", name, NAME_BYTES)
    if len(set(value)) != len(value):
        raise ValueError(f"task spec: {key}: names must differ, got {list(value)}")
    return tuple(value)


def _targets(value: Any, actions: Sequence[str], states: Sequence[str]) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"task spec: targets: expected {{action name: state name}}, got {shown(value)}")
    for action, state in value.items():
        if action not in actions:
            raise ValueError(f"task spec: targets: expected one of {', '.join(actions)}, got {shown(action)}")
        if state not in states:
            raise ValueError(f"task spec: targets.{action}: expected one of {', '.join(states)}, got {shown(state)}")
    return dict(value)


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    if not _is_list(value) or not all(_is_number(number) and not np.isnan(number) for number in value):
        raise ValueError(f"task spec: {key}: expected a list of numbers, got {shown(value)}")
    return tuple(float(number) for number in value)


def _check_range(what: str, names: tuple[str, ...], low: tuple[float, ...], high: tuple[float, ...]) -> None:
    for key, bound in ((f"{what}_low", low), (f"{what}_high", high)):
        if len(bound) != len(names):
            raise ValueError(f"task spec: {key}: expected {len(names)} numbers ({what}_names), got {len(bound)}")
    for name, lowest, highest in zip(names, low, high, strict=True):
        if not lowest < highest:
            raise ValueError(f"task spec: {what} dim {name!r}: low {lowest} must be below high {highest}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
