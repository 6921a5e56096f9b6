"""Two SO-101 arms of servos at pseudo-terminals, and the person who holds the leader; used by test_so101_loop.py.

Nothing in the actor is replaced but its cameras: LeRobot's own driver talks to the servos byte for byte. The person
brings the leader home when the arm is there, moves it to the goal, and takes over where the policy dawdles.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from lerobot_rig import Rig

from serl_robot_infra import lerobot_devices

HOME = np.array([0.0, -60.0, 60.0, 45.0, 0.0, 30.0])  # of config/task/so101.yaml
GOAL = np.array([30.0, -35.0, 40.0, 45.0, 0.0, 30.0])  # of so101_lab/config/task/so101_fake.yaml
HAND_SPEED = 25.0  # degrees per second
PATIENCE_S = 4.0  # before the person helps a policy that goes astray
STUCK_S = 1.0  # one that comes no nearer is helped sooner: what is waited through is recorded, and learned from
HELP_S = 8.0
NEAR = 3.0  # degrees
PERIOD_S = 0.02
_TICKS = 4095  # of a servo's turn; its middle is 0 degrees, and the gripper has 0 to 100 over it


class Arms:
    """Context manager: `follower` and `leader`, servos with LeRobot's ids, where so101_fake.yaml looks for them."""

    def __init__(self, folder: Path):
        self._folder, self._stack = folder, ExitStack()

    def __enter__(self) -> "Arms":
        for name, make, kind in (
            ("follower", lerobot_devices.make_robot, "so101_follower"),
            ("leader", lerobot_devices.make_teleoperator, "so101_leader"),
        ):
            (self._folder / name).mkdir(parents=True)
            node = {"type": kind, "id": name, "use_degrees": True}
            rig = self._stack.enter_context(Rig(self._folder / name, make, node))
            setattr(self, name, rig.chains[0].servos)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()


def put(servos, pose: np.ndarray) -> None:
    """Move an arm without torque by hand; degrees, the gripper 0 to 100."""
    for servo, value in zip(servos.values(), pose, strict=True):
        share = value / 100 if servo is servos[6] else value / 360 + 0.5
        servo.set("Present_Position", round(share * _TICKS))


def pose_of(servos) -> np.ndarray:
    """float64[6], degrees, the gripper 0 to 100."""
    shares = np.array([servo.get("Present_Position") / _TICKS for servo in servos.values()])
    return np.append((shares[:5] - 0.5) * 360, shares[5] * 100)


class Person(threading.Thread):
    """press: the key that takes over, at the actor's terminal."""

    def __init__(self, arms: Arms, press: Callable[[], None]):
        super().__init__(daemon=True)
        self._arms, self._press, self._rng = arms, press, np.random.default_rng(0)
        self._hand, self._away = HOME, False
        self._nearest, self._nearest_at = np.inf, 0.0
        self.helped = 0

    def run(self) -> None:
        while True:
            self._until(self._at_home, 3600)
            self._away = False
            self._put(HOME)
            time.sleep(0.4)
            # A demonstration follows the leader; while the policy drives nobody looks at it.
            self._nearest, self._nearest_at = np.inf, time.monotonic() + STUCK_S  # it takes a moment to begin
            if not self._drive(PATIENCE_S, self._comes_no_nearer):
                self._put(pose_of(self._arms.follower))
                self._press()
                self.helped += 1
                self._drive(HELP_S)

    def _comes_no_nearer(self) -> bool:
        off = np.abs(pose_of(self._arms.follower) - GOAL)[:3].max()
        if off < self._nearest - 1.0:
            self._nearest, self._nearest_at = off, max(time.monotonic(), self._nearest_at)
        return bool(off > NEAR) and time.monotonic() - self._nearest_at > STUCK_S

    def _drive(self, seconds: float, stuck: Callable[[], bool] = lambda: False) -> bool:
        """To the goal, with a hand's inaccuracy, and back once the arm leaves it. True: it is home again."""
        goal, step = GOAL + self._rng.normal(0, 0.5, 6) * [1, 1, 1, 1, 1, 0], HAND_SPEED * PERIOD_S
        reached = False

        def moved() -> bool:
            nonlocal reached
            pose = pose_of(self._arms.follower)
            off = np.abs(pose - goal)[:3].max()
            reached = reached or off < NEAR
            over = reached and off > 2 * NEAR  # the arm goes home
            self._put(HOME if over else self._hand + np.clip(goal - self._hand, -step, step))
            return self._at_home() and self._away

        return self._until(lambda: moved() or stuck(), seconds) and self._at_home() and self._away

    def _at_home(self) -> bool:
        near = np.abs(pose_of(self._arms.follower) - HOME)[:5].max() < NEAR
        self._away = self._away or not near
        return bool(near)

    def _put(self, pose: np.ndarray) -> None:
        self._hand = pose
        put(self._arms.leader, pose)

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(PERIOD_S)
        return True
