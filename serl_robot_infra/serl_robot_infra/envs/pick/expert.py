"""The scripted expert of the pick task. Used as the operator: for demonstrations and for takeovers in mid-episode.

It reads the simulator's privileged state. Phases: hover over the cube, descend, close, lift; whenever the cube slipped
away from where the phase expects it, back to hovering. So it can start from any state of an episode.
"""

from enum import Enum
from typing import Protocol

import numpy as np

from serl_transport.contract.specs import TaskSpec

_HOVER_HEIGHT = 0.07
_CLOSING_TICKS = 4


class _Phase(Enum):
    HOVER = "hover"
    DESCEND = "descend"
    CLOSE = "close"
    LIFT = "lift"


class PickScene(Protocol):
    """What the expert reads of the environment that it acts in; `PickEnv` answers it."""

    @property
    def spec(self) -> TaskSpec:
        """The task's contract; its action limits clip what the expert commands."""
        ...

    @property
    def cube_position(self) -> np.ndarray:
        """float64[3], metres."""
        ...

    @property
    def tcp_position(self) -> np.ndarray:
        """float64[3], the point between the finger tips, metres."""
        ...


class PickExpert:
    """Answers `envs.base.Expert` for one scene."""

    def __init__(self, scene: PickScene):
        self._scene = scene
        self.reset()

    def reset(self) -> None:
        """Start from hovering, whatever the state of the episode."""
        self._phase = _Phase.HOVER
        self._closing = 0

    def act(self) -> np.ndarray:
        """float32[4]: metres and gripper command, within the limits of the task."""
        to_cube = self._scene.cube_position - self._scene.tcp_position
        self._advance(to_cube)
        move, gripper = self._command(to_cube)
        low, high = self._scene.spec.action_low, self._scene.spec.action_high
        return np.clip([*move, gripper], low, high).astype(np.float32)

    def _advance(self, to_cube: np.ndarray) -> None:
        """Choose the phase from where the cube is, seen from between the finger tips (float64[3], metres)."""
        beside = float(np.linalg.norm(to_cube[:2]))
        if self._phase is _Phase.LIFT and (beside > 0.03 or abs(to_cube[2]) > 0.03):
            self._phase = _Phase.HOVER
        if self._phase is _Phase.HOVER and beside < 0.008 and abs(to_cube[2] + _HOVER_HEIGHT) < 0.03:
            self._phase = _Phase.DESCEND
        if self._phase is _Phase.DESCEND:
            if beside > 0.03:
                self._phase = _Phase.HOVER
            elif abs(to_cube[2]) < 0.006:
                self._phase, self._closing = _Phase.CLOSE, 0
        if self._phase is _Phase.CLOSE:
            self._closing += 1
            if self._closing > _CLOSING_TICKS:
                self._phase = _Phase.LIFT

    def _command(self, to_cube: np.ndarray) -> tuple[np.ndarray, float]:
        match self._phase:
            case _Phase.HOVER:
                return to_cube + np.array([0.0, 0.0, _HOVER_HEIGHT]), -1.0
            case _Phase.DESCEND:
                return to_cube, -1.0
            case _Phase.CLOSE:
                return np.zeros(3), 1.0
            case _Phase.LIFT:
                return np.array([0.0, 0.0, 0.05]), 1.0
