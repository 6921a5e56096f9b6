"""A judge who errs as people do, for the ablation of the short-episode filter. Named by variants of learning.py.

EnvironmentReward ─▶ MistakenKey: the truth, but for some episodes that "succeed" in their first ticks
"""

from dataclasses import replace

import numpy as np

from serl_robot_infra.envs.base import StepResult


class MistakenKey:
    """The environment's word, but in some episodes the success key is pressed at once: twice, or for the last episode.

    Answers `serl_robot_infra.rewards.base.RewardSource`.

    probability: share of the episodes that are ended so. within: the mistake comes at a tick drawn from 1 to this.
    spared: so many episodes at first, the demonstrations, are judged rightly. seed: of the draws. Raises ValueError
    for a share outside [0, 1] or within below 1.
    """

    success_source = "human"

    def __init__(self, probability: float, within: int, spared: int, seed: int) -> None:
        if not 0 <= probability <= 1 or within < 1:
            raise ValueError(
                f"reward: expected probability in [0, 1] and within of 1 or more, got {probability} and {within}"
            )
        self._probability, self._within, self._spared = probability, within, spared
        self._rng = np.random.default_rng(seed)
        self._ticks = 0
        self._mistake_at: int | None = None

    def reset(self) -> None:
        """Begin an episode: draw whether and when the key is pressed."""
        self._ticks, self._spared = 0, self._spared - 1
        errs = self._spared < 0 and self._rng.random() < self._probability
        self._mistake_at = int(self._rng.integers(1, self._within + 1)) if errs else None

    def judge(self, result: StepResult) -> StepResult:
        """`result`, or at the tick of the mistake a success that was none."""
        self._ticks += 1
        if self._ticks != self._mistake_at:
            return result
        return replace(result, reward=1.0, success=True, terminated=True, truncated=False)
