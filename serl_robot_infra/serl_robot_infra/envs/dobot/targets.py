"""What an arm is told to reach: joint targets, or a tool pose that displacements carry on. No socket here.

    joints: float64[6] rad ─▶ within max_lead of the measured joints
    tool:   displacement float64[6] ─▶ the pose commanded last, moved on ─▶ within the lead of the measured pose ─▶ box

Called by part.py. Both answer with what became of the wish: it is what is recorded as executed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serl_robot_infra.envs.dobot.rotation import angles_of, matrix_of_angles, matrix_of_vector, vector_of

AXES = ("x", "y", "z")


@dataclass(frozen=True, slots=True)
class Lead:
    """How far a target may be ahead of what is measured: the driver's own limit, whoever drives."""

    joints: float = 0.35  # rad
    position: float = 0.05  # m, each axis
    rotation: float = 0.35  # rad

    def __post_init__(self) -> None:
        for name in ("joints", "position", "rotation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")


class Box:
    """Where a tool's tip may be commanded: axis -> [low, high], m, in the arm's base; an axis left out is free."""

    def __init__(self, limits: Mapping[str, Sequence[float]]):
        self._low, self._high = np.full(3, -np.inf), np.full(3, np.inf)
        for axis, range_ in limits.items():
            if axis not in AXES:
                raise ValueError(f"{axis}: expected one of {', '.join(AXES)}")
            try:
                low, high = map(float, range_)
            except (TypeError, ValueError):
                raise ValueError(f"{axis}: expected [low, high] in m, got {range_!r}") from None
            if not low < high:
                raise ValueError(f"{axis}: low {low} must be below high {high}")
            self._low[AXES.index(axis)], self._high[AXES.index(axis)] = low, high

    def keep(self, position: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Inside; from outside no further out than it is."""
        return np.clip(position, np.minimum(self._low, measured), np.maximum(self._high, measured))


class ToolTarget:
    """The pose that one arm's tool was told to reach last; the next displacement starts from it."""

    def __init__(self, lead: Lead, box: Box):
        self._lead, self._box = lead, box
        self.forget()

    def forget(self) -> None:
        """The arm was told something else: the next displacement starts from where it is measured."""
        self._position: np.ndarray | None = None
        self._rotation = np.eye(3)

    def move(self, displacement: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pose float64[6] to command, float64[6] what became of the displacement).

        Args:
            displacement: float64[6], m along the base's axes, and a rotation vector about them, rad.
            measured: float64[6], the pose that is measured, m and rad.
        """
        at, turned = measured[:3], matrix_of_angles(measured[3:])
        if self._position is None:
            self._position, self._rotation = at, turned
        lead = self._lead
        position = np.clip(self._position + displacement[:3], at - lead.position, at + lead.position)
        position = self._box.keep(position, at)
        ahead = vector_of(matrix_of_vector(displacement[3:]) @ self._rotation @ turned.T)
        if (angle := float(np.linalg.norm(ahead))) > lead.rotation:
            ahead *= lead.rotation / angle
        rotation = matrix_of_vector(ahead) @ turned
        made = np.concatenate([position - self._position, vector_of(rotation @ self._rotation.T)])
        self._position, self._rotation = position, rotation
        return np.concatenate([position, angles_of(rotation)]), made


def bounded_joints(wish: np.ndarray, measured: np.ndarray, lead: Lead) -> np.ndarray:
    """float64[6], rad: the wish, no further from the measured joints than the lead."""
    return np.clip(wish, measured - lead.joints, measured + lead.joints)
