"""Success when the robot's state has been at a goal for some ticks: the task ends in a pose. `reward=goal_pose`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from serl_robot_infra.envs.base import StepResult


class GoalPoseReward:
    """Answers `rewards.base.RewardSource`.

    state_names: of the task, in order. goal: state name -> value, physical units; others do not matter.
    tolerance: state name -> largest difference that still counts. hold_ticks: ticks in a row at the goal. ValueError
    names a state that the task has not got, or one without a tolerance.
    """

    success_source = "environment"

    def __init__(
        self,
        state_names: Sequence[str],
        goal: Mapping[str, float] | None,
        tolerance: Mapping[str, float] | None,
        hold_ticks: int = 3,
    ) -> None:
        names, goal, tolerance = list(state_names), goal or {}, tolerance or {}
        unknown = [name for name in goal if name not in names]
        if unknown or set(goal) != set(tolerance) or not goal:
            raise ValueError(
                f"reward.goal and reward.tolerance: expected the same states of {', '.join(names)}, "
                f"got {', '.join(goal) or 'none'} and {', '.join(tolerance) or 'none'}"
            )
        self._rows = [names.index(name) for name in goal]
        self._goal = np.array([goal[name] for name in goal])
        self._tolerance = np.array([tolerance[name] for name in goal])
        self._hold_ticks = hold_ticks
        self.reset()

    def reset(self) -> None:
        self._held = 0

    def judge(self, result: StepResult) -> StepResult:
        """Reward 1 and the end of the episode after `hold_ticks` at the goal; the environment may still end it."""
        off = np.abs(np.asarray(result.observation.state)[self._rows] - self._goal)
        self._held = self._held + 1 if bool((off <= self._tolerance).all()) else 0
        success = self._held >= self._hold_ticks
        return replace(result, reward=float(success), success=success, terminated=success or result.terminated)
