"""The environment's own loop for some seconds, and what each camera showed. Nothing moves unless that is said.

    robot without --move   env.observe() again and again: the driver's own reading of its cameras and joints
    robot with --move      env.reset(), then step() with an action that keeps it where it is, through the safety chain
    simulation             reset() and step() as well: there is nothing to move

Called by `robot.check`; an `Observed` flows out.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from serl_robot_infra.envs.base import Environment
from serl_robot_infra.guard import RobotGuard, Stoppable
from serl_robot_infra.pacing import Pace
from serl_robot_infra.safety import SafetyChain
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

THUMBNAIL = (24, 24)
Look = Callable[[], Observation]


class NotMovedError(Exception):
    """The environment cannot be looked at without a motion; the message says what to do."""


@dataclass(slots=True)
class CameraWatch:
    """One camera's pictures."""

    last: np.ndarray | None = None  # uint8[h, w, 3], the newest
    pictures: int = 0
    new: int = 0  # of them, that differed from the one before
    _sum: np.ndarray = field(default_factory=lambda: np.zeros(THUMBNAIL, np.float64))

    def add(self, image: np.ndarray) -> None:
        """One more."""
        self.new += self.last is None or not np.array_equal(self.last, image)
        self.last = image.copy()  # a driver may fill the same array again
        self.pictures += 1
        self._sum += thumbnail(image)

    @property
    def mean(self) -> np.ndarray:
        """float64[24, 24], the mean of all pictures, grey and small."""
        return self._sum / max(1, self.pictures)


@dataclass(slots=True)
class Observed:
    """What the loop showed."""

    rate_hz: float  # that was asked for
    cameras: dict[str, CameraWatch]
    took_s: list[float] = field(default_factory=list)  # of each call of the driver
    states: list[np.ndarray] = field(default_factory=list)  # float32[s] each
    seconds: float = 0.0  # that its ticks took

    @property
    def last(self) -> Observation:
        """The newest observation."""
        images = {name: camera.last for name, camera in self.cameras.items() if camera.last is not None}
        return Observation(images, self.states[-1])

    @property
    def reached_hz(self) -> float:
        """Ticks per second."""
        return len(self.took_s) / self.seconds if self.seconds else 0.0


def thumbnail(image: np.ndarray) -> np.ndarray:
    """float64[24, 24], grey, of a uint8[h, w, 3]."""
    return np.asarray(Image.fromarray(image).convert("L").resize(THUMBNAIL, Image.Resampling.BOX), np.float64)


def still_action(spec: TaskSpec, state: np.ndarray) -> np.ndarray:
    """float32[ad] that keeps the robot where it is: no displacement, and as each target the measured state."""
    action = np.zeros(spec.action_dim, np.float32)
    for place, sensed in spec.target_dims.items():
        action[place] = state[sensed]
    return np.clip(action, np.float32(spec.action_low), np.float32(spec.action_high))


def watch(look: Look, spec: TaskSpec, rate_hz: float, seconds: float, observed: Observed) -> None:
    """Look at the control rate for so long; `observed` is filled, also up to an error of the driver, which goes on.

    Raises ValueError for an observation that does not fit the task.
    """
    pace = Pace(rate_hz)
    pace.start()
    began = time.monotonic()
    while (now := time.monotonic()) - began < seconds or not observed.took_s:
        observation = look()
        observed.took_s.append(time.monotonic() - now)
        observed.seconds = time.monotonic() - began
        spec.check_observation(observation)
        observed.states.append(observation.state.copy())
        for name, camera in observed.cameras.items():
            camera.add(observation.images[name])
        pace.wait()
        observed.seconds = time.monotonic() - began


def looker(env: Environment, guard: RobotGuard, safety: Mapping[str, Any] | None, move: bool) -> Look:
    """How this environment is looked at. NotMovedError: not without a motion that was not allowed."""
    if isinstance(env, Stoppable) and not move:
        observe = getattr(env, "observe", None)
        if observe is None:
            raise NotMovedError(
                f"{type(env).__name__} has no observe(): give it one (docs/robot.md, The class), or say --move"
            )
        return observe
    chain = SafetyChain.of(env.spec, safety)
    if (reason := guard.begin()) is not None:
        raise NotMovedError(f"nothing may move: {reason}")
    seen = [env.reset(0)]
    still = still_action(env.spec, seen[0].state)  # once: read anew it would sink with the arm

    def step() -> Observation:
        action = chain.filter(still, seen[0].state, "check_robot")
        if (reason := guard.feed()) is not None:
            raise NotMovedError(f"nothing may move: {reason}")
        seen[0] = env.step(action).observation
        return seen[0]

    return step
