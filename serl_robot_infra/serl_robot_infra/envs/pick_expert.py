"""The scripted expert of the tasks that pick a cube up. Used as the operator: for demonstrations and for takeovers.

It reads the simulator's privileged state. Phases: hover over the cube, descend, close, lift; whenever the cube slipped
away from where the phase expects it, back to hovering. So it can start from any state of an episode.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serl_transport.contract.specs import TaskSpec

_CLOSING_TICKS = 4


@dataclass(frozen=True, slots=True)
class Grasp:
    """One gripper in numbers, metres; distances are of the cube from between the finger tips."""

    hover: float  # height over the cube to come in at
    over: float  # so little aside it goes down
    level: float  # and so near to that height
    around: float  # so little aside it closes
    depth: float  # and so little above or below
    slipped: float  # so far aside, or when lifting off in height, it starts again


class PickScene(Protocol):
    """What the expert reads of the environment that it acts in; the action is (dx, dy, dz, grip)."""

    spec: TaskSpec
    """Its action limits clip what the expert commands."""

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

    def __init__(self, scene: PickScene, grasp: Grasp):
        self._scene, self._grasp = scene, grasp
        self.reset()

    def reset(self) -> None:
        """Start from hovering, whatever the state of the episode."""
        self._phase, self._closing = "hover", 0

    def act(self) -> np.ndarray:
        """float32[4]: metres and gripper command, within the limits of the task."""
        to_cube = self._scene.cube_position - self._scene.tcp_position
        self._advance(to_cube)
        move, grip = {
            "hover": (to_cube + np.array([0.0, 0.0, self._grasp.hover]), -1.0),
            "descend": (to_cube, -1.0),
            "close": (np.zeros(3), 1.0),
            "lift": (np.array([0.0, 0.0, 0.05]), 1.0),
        }[self._phase]
        return np.clip([*move, grip], self._scene.spec.action_low, self._scene.spec.action_high).astype(np.float32)

    def _advance(self, to_cube: np.ndarray) -> None:
        """Choose the phase from where the cube is, seen from between the finger tips (float64[3], metres)."""
        grasp, aside, height = self._grasp, float(np.linalg.norm(to_cube[:2])), to_cube[2]
        if self._phase == "lift" and (aside > grasp.slipped or abs(height) > grasp.slipped):
            self._phase = "hover"
        if self._phase == "hover" and aside < grasp.over and abs(height + grasp.hover) < grasp.level:
            self._phase = "descend"
        if self._phase == "descend":
            if aside > grasp.slipped:
                self._phase = "hover"
            elif abs(height) < grasp.depth and aside < grasp.around:
                self._phase, self._closing = "close", 0
        if self._phase == "close":
            self._closing += 1
            if self._closing > _CLOSING_TICKS:
                self._phase = "lift"
