"""The n-way stage rule: how far an episode has come by what a process classifier says of its observations.

The actor rewards by it while the episode runs (rewards/classifier.py on the robot side), the audit judges whole
episodes by it afterwards (serl_launcher.rewards.judging): one rule, so that they agree.
"""

import numpy as np


def stage_after(reached: int, probabilities: np.ndarray) -> int:
    """The furthest stage after one more observation; probabilities: float32[classes].

    One stage at a time: a classifier that jumps is wrong more often than a robot is that fast. None is lost again.

    >>> stage_after(0, np.array([0.1, 0.2, 0.7]))
    1
    """
    return max(reached, min(int(np.argmax(probabilities)), reached + 1))
