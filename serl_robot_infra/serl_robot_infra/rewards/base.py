"""What a reward source is to the actor loop: it judges each step's result. Implemented by each file beside."""

from typing import Protocol

from serl_robot_infra.envs.base import StepResult


class RewardSource(Protocol):
    """One episode at a time."""

    success_source: str
    """`environment`, `human` or `classifier`, as recorded in the episode's outcome."""

    def reset(self) -> None:
        """Begin an episode."""
        ...

    def judge(self, result: StepResult) -> StepResult:
        """The same result with this source's reward, success and termination."""
        ...
