"""The environment's own reward and success, passed through: the default, and the truth in simulation."""

from serl_robot_infra.envs.base import StepResult


class EnvironmentReward:
    """Answers `rewards.base.RewardSource`."""

    success_source = "environment"

    def reset(self) -> None:
        """Nothing to forget."""

    def judge(self, result: StepResult) -> StepResult:
        """`result` as it is."""
        return result
