"""Nothing but a person says how an episode ended. `reward=operator`.

    operator's device ─▶ Words ─▶ episode.py: the verdict        (reward=human_key adds two keys of the terminal)

The episode runner turns a person's word into reward, success and end, whatever the reward source; this one adds that
the environment's own success and reward do not count, and its end is a failure.
"""

from dataclasses import replace

from serl_robot_infra.envs.base import StepResult


class OperatorReward:
    """Answers `rewards.base.RewardSource`."""

    success_source = "human"

    def reset(self) -> None:
        """Nothing to forget: the words are the runner's."""

    def judge(self, result: StepResult) -> StepResult:
        """The environment's end, as a failure."""
        return replace(result, reward=0.0, success=False)
