"""An operator for those tasks of Meta-World in which a thing is gripped and carried. Called by `MetaWorldEnv.expert`.

Meta-World's own scripts solve these tasks from the start, but not from wherever a policy has got to: they close the
gripper before it is down and then stand on the handle, or chase the thing that they hold when it has slipped by a
centimetre. What the operator cannot correct no policy is taught, so this one comes in open, grips, and then steers the
thing rather than the hand. benchmarks/operators.py prints the rates of both.
"""

from dataclasses import dataclass

import numpy as np

GAIN = 25.0  # as in Meta-World's scripts: share of the largest move per metre of error, at one step a tick
RESTING = 0.035  # a thing whose centre is above this is lifted, metres
LIFT = 0.25  # height that the hand makes for until the thing is clear, metres


@dataclass(frozen=True, slots=True)
class Carry:
    """One task in numbers, metres."""

    hover: float  # of the hand above the thing while it comes over it; lower, the fingers push it away
    grasp: float  # of the hand above the thing where the fingers are around it
    slack: float  # of that
    above: float  # how far aside the hand may be to go down
    around: float  # and to have the thing in its fingers
    gripped: float  # opening of the gripper, 0 to 1, below which the thing is held and may be lifted
    clear: float  # height of the thing from which on it may go sideways


TASKS = {
    "box-close-v3": Carry(hover=0.185, grasp=0.065, slack=0.008, above=0.012, around=0.05, gripped=0.45, clear=0.1),
    "pick-place-v3": Carry(hover=0.12, grasp=0.03, slack=0.015, above=0.015, around=0.03, gripped=0.75, clear=0.0),
}


class CarryScript:
    """Answers `get_action` as the scripted policies of Meta-World do; without memory, so it recovers from anywhere.

    repeat: Meta-World steps of each action.
    """

    def __init__(self, task: Carry, repeat: int) -> None:
        self._task, self._gain = task, GAIN / repeat

    def get_action(self, seen: np.ndarray) -> np.ndarray:
        """float64[4], shares of the largest move and the grip, from Meta-World's observation float64[39]."""
        hand, opening, thing, goal = seen[:3], seen[3], seen[4:7], seen[-3:]
        target, grip = self._plan(hand, opening, thing, goal)
        return np.append(np.clip(self._gain * (target - hand), -1.0, 1.0), grip)

    def _plan(self, hand: np.ndarray, opening: float, thing: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, float]:
        """Where the hand should be, metres, and the grip: open -1, closed 1."""
        task, offset = self._task, thing - hand
        aside, gap = np.linalg.norm(offset[:2]), -offset[2]
        if aside > task.around or gap > task.grasp + task.slack:  # over the thing, then down, open
            height = thing[2] + (task.grasp - 0.005 if aside < task.above else task.hover)
            return np.array([*thing[:2], height]), -1.0
        if thing[2] <= RESTING and opening > task.gripped:
            return hand, 1.0
        if thing[2] < task.clear:
            return np.array([*hand[:2], LIFT]), 1.0
        return goal - offset, 1.0  # the thing, wherever in the grip it is, to the goal
