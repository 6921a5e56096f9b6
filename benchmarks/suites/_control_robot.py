"""The robot of the control suite: does nothing, at once, and notes when. Its state tells the policy how slow to be."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from serl_robot_infra.envs.base import StepResult
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec


class IdleRobot:
    """One episode of `ticks` ticks. Has hold and stop, so guard and watchdog run as they do for a robot."""

    last: "IdleRobot"  # the newest one: the actor builds it from its config

    def __init__(self, spec: Mapping[str, Any], delay_s: float, chunk: int, ticks: int) -> None:
        self.spec, self._ticks = TaskSpec.from_dict(dict(spec)), ticks
        images = {name: np.zeros((*size, 3), np.uint8) for name, size in self.spec.cameras.items()}
        self._seen = Observation(images, np.array([delay_s, chunk], np.float32))
        self.sent_at: list[float] = []  # time.monotonic() of each action
        self.holds = 0
        IdleRobot.last = self

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        return self._seen

    def step(self, action: np.ndarray) -> StepResult:
        self.sent_at.append(time.monotonic())
        return StepResult(self._seen, 0.0, False, len(self.sent_at) >= self._ticks, False)

    def hold(self) -> None:
        self.holds += 1

    def stop(self) -> None: ...

    def close(self) -> None: ...
