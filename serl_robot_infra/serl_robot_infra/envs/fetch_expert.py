"""A scripted operator for Gymnasium-Robotics' FetchReach and FetchPickAndPlace. Named by config/task/fetch_*.yaml.

It reads the observation's own numbers: hand and thing, where there is one, and the goal. Without memory, so it starts
from any state of an episode.
"""

from typing import Any

import numpy as np

from serl_robot_infra.envs.metaworld_carry import Carry, CarryScript

_TABLE = 0.405  # a thing at rest is 0.02 m above this, metres
_OPEN = 0.1  # gap between the fingers of an open gripper, metres
_PICK = Carry(hover=0.08, grasp=0.005, slack=0.01, above=0.015, around=0.03, gripped=0.6, clear=0.0)


class FetchExpert:
    """Answers `envs.base.Expert`. The action is (dx, dy, dz, grip): metres per tick, and a grip; positive opens."""

    def __init__(self, env: Any):
        self._env, self._script = env, CarryScript(_PICK, repeat=2)

    def reset(self) -> None:
        """Nothing to forget."""

    def act(self) -> np.ndarray:
        """float32[4], within the limits of the task."""
        seen, goal = self._env.raw["observation"], self._env.raw["desired_goal"]
        low, high = np.asarray(self._env.spec.action_low), np.asarray(self._env.spec.action_high)
        if len(seen) < 25:  # FetchReach: nothing to carry
            return np.clip([*(goal - seen[:3]), -1.0], low, high).astype(np.float32)
        table = np.array([0.0, 0.0, _TABLE])
        opening = (seen[9] + seen[10]) / _OPEN
        share = self._script.get_action(np.array([*(seen[:3] - table), opening, *(seen[3:6] - table), *(goal - table)]))
        return np.clip([*(share[:3] * high[:3]), -share[3]], low, high).astype(np.float32)
