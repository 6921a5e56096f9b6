"""A lab's package for task=so101_fake: a camera that LeRobot does not know, and servos that answer late.

Named by `env._target_` of config/task/so101_fake.yaml, so that the actor imports it before the robot is made.
"""

from dataclasses import dataclass

import numpy as np
from lerobot.cameras import Camera, CameraConfig
from lerobot.motors.feetech import feetech

from serl_robot_infra.envs.lerobot_robot import LeRobotEnv

__all__ = ["LabCamera", "LabCameraConfig", "LeRobotEnv"]


@CameraConfig.register_subclass("lab")
@dataclass(kw_only=True)
class LabCameraConfig(CameraConfig):
    """As an OpenCV camera's; nothing is opened."""

    index_or_path: int | str = 0


class LabCamera(Camera):
    """Noise around a shade, a new picture at each look: uint8[h, w, 3]."""

    def __init__(self, config: LabCameraConfig):
        super().__init__(config)
        self._rng: np.random.Generator | None = None

    @property
    def is_connected(self) -> bool:
        return self._rng is not None

    @staticmethod
    def find_cameras() -> list[dict]:
        return []

    def connect(self, warmup: bool = True) -> None:
        self._rng = np.random.default_rng(0)

    def read(self) -> np.ndarray:
        return self._rng.integers(90, 110, (self.height, self.width, 3), np.uint8)

    def async_read(self, timeout_ms: float = 200) -> np.ndarray:
        return self.read()

    def read_latest(self, max_age_ms: int = 500) -> np.ndarray:
        return self.read()

    def disconnect(self) -> None:
        self._rng = None


def _patient(port, packet_length) -> None:
    """A loaded machine's servos answer late, and that is not what is tried here."""
    port.packet_start_time, port.packet_timeout = port.getCurrentTime(), 3000.0


feetech.patch_setPacketTimeout = _patient
