"""The pick task as a robot for tools/check_robot.py: it can be looked at without a motion, and parts of it can fail."""

import time

import numpy as np
from scripted_learner import RobotPick

from serl_transport.contract.schema import Observation


class CheckedPick(RobotPick):
    """frozen, black: a camera's name. swapped: the two cameras in each other's place. slow_s: of each observation.

    half: what `limits` says is half of the task's. deaf: `stop` raises. second_way: a command that stops it as well.
    """

    def __init__(
        self, frozen=None, black=None, swapped=False, slow_s=0.0, half=False, deaf=False, second_way=None, **options
    ):
        super().__init__(**options)
        self._frozen, self._black, self._swapped, self._slow_s = frozen, black, swapped, slow_s
        if second_way:
            self.stopper = {"_target_": "serl_robot_infra.watchdog.StopCommand", "argv": list(second_way)}
        self._half, self._deaf, self._sensor = half, deaf, np.random.default_rng(0)
        self._home_scene = super(RobotPick, self).reset(0)

    def observe(self) -> Observation:
        time.sleep(self._slow_s)
        return self._taken()

    def limits(self) -> dict[str, tuple[float, float]]:
        share = 0.5 if self._half else 1.0
        spec = self.spec
        return {
            n: (share * a, share * b)
            for n, a, b in zip(spec.action_names, spec.action_low, spec.action_high, strict=True)
        }

    def stop(self) -> None:
        if self._deaf:
            raise ConnectionError("the controller does not answer")
        super().stop()

    def _taken(self) -> Observation:
        """A sensor's noise changes every picture."""
        images = {name: self._noisy(image) for name, image in self._home_scene.images.items()}
        if self._swapped:
            images["front"], images["wrist"] = images["wrist"], images["front"]
        if self._frozen:
            images[self._frozen] = self._home_scene.images[self._frozen]
        if self._black:
            images[self._black] = self._sensor.integers(0, 3, images[self._black].shape, np.uint8)
        return Observation(images, self._home_scene.state)

    def _noisy(self, image: np.ndarray) -> np.ndarray:
        noise = self._sensor.integers(-2, 3, image.shape)
        return np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)
