"""A leader arm is matched to the robot before it drives. Called by lerobot_teleop.py and dobot_leader.py.

taken over: the robot goes to the leader, at most `step` a tick ─▶ near enough ─▶ it follows
"""

import logging
from collections.abc import Sequence

import numpy as np

log = logging.getLogger(__name__)


class Matching:
    """Of one operator.

    Args:
        joints: (action, state) of each joint that leader and robot share; none: nothing to match.
        step: units a tick; tolerance: units, each joint.
        names: of the actions; hz: of the control loop.
    """

    def __init__(
        self, joints: Sequence[tuple[int, int]], step: float, tolerance: float, names: Sequence[str], hz: float
    ):
        self._rows, self._columns = [row for row, _ in joints], [column for _, column in joints]
        self._step, self._tolerance, self._names, self._hz = step, tolerance, names, hz
        self.forget()

    def forget(self) -> None:
        """The operator does not drive, or begins to."""
        self.matched = not self._rows
        self._target: np.ndarray | None = None  # float32[ad]

    def toward(self, wish: np.ndarray, state: np.ndarray) -> np.ndarray:
        """float32[ad]: the leader's wish once matched; before that a step nearer to it. state: float32[s], sensed."""
        if self.matched:
            return wish
        if self._target is None:
            self._target = wish.copy()
            self._target[self._rows] = state[self._columns]
            self._tell(wish - self._target)
        gap = wish[self._rows] - self._target[self._rows]
        self.matched = bool(np.abs(gap).max() <= self._tolerance)
        self._target[self._rows] += np.clip(gap, -self._step, self._step)
        return wish if self.matched else self._target.copy()

    def _tell(self, gap: np.ndarray) -> None:
        far = int(np.abs(gap).argmax())
        if abs(gap[far]) > self._tolerance:
            log.warning(
                "the arm goes to the leader at %g units per second, then follows it: %s is %.3g away",
                self._step * self._hz, self._names[far], abs(gap[far]),
            )  # fmt: skip
