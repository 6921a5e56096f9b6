"""gym-hil's PandaPickCube behind our interface: a Franka arm under operational-space control, meshes from its wheel.

Called by the actor loop like any environment; needs the `hil` extra. The action is `(dx, dy, dz, grip)`: metres per
10 Hz tick, at most 0.025 each, and a gripper command in [-1, 1] that closes when positive.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import mujoco
import numpy as np

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.pick_expert import Grasp, PickExpert
from serl_robot_infra.envs.simulated import SimulatedEnv
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

STEP_LIMIT = 0.025
"""Largest commanded translation of one tick, metres per axis."""

_CAMERAS = {"front": "front", "wrist": "handcam_rgb"}
_GRIPPER_MAX = 255.0
_REACH_LOW, _REACH_HIGH = (0.2, -0.3, 0.0), (0.6, 0.3, 0.5)
_GRASP = Grasp(hover=0.08, over=0.01, level=0.02, around=0.01, depth=0.008, slipped=0.04)


class GymHilPickEnv(SimulatedEnv):
    """Answers `envs.base.ScriptedEnvironment`.

    image_size: side of the square images, pixels. cameras: which of `front` and `wrist` to render; none for a task of
    states alone. cube_in_state: append the cube's position to the state, for that task. ImportError: gym-hil is not
    installed; ValueError: no such camera.
    """

    def __init__(
        self,
        image_size: int = 64,
        renderer: str = "ray",
        prompt: str = "pick up the cube",
        cameras: Sequence[str] = ("front", "wrist"),
        cube_in_state: bool = False,
    ):
        try:
            from gym_hil.envs import PandaPickCubeGymEnv
        except ImportError as error:
            raise ImportError(
                f"task=pick_gym_hil needs gym-hil ({error}): pip install 'serl-robot-infra[hil]'"
            ) from None
        for camera in cameras:
            if camera not in _CAMERAS:
                raise ValueError(f"cameras: gym-hil has {sorted(_CAMERAS)}, got {camera!r}")
        with mock.patch.object(mujoco, "Renderer", _NoRenderer):
            self._env = PandaPickCubeGymEnv(random_block_position=True)
        self._cube_in_state = cube_in_state
        self._finger = self._env.model.joint("right_driver_joint").qposadr[0]
        self._gripper = self._env.model.actuator("fingers_actuator").id
        spec = TaskSpec(
            name="pick_gym_hil_state" if cube_in_state else "pick_gym_hil",
            prompt=prompt,
            cameras={camera: (image_size, image_size) for camera in cameras},
            state_names=("x", "y", "z", "grip_command", "finger", *(("cube_x", "cube_y", "cube_z") * cube_in_state)),
            state_low=(*_REACH_LOW, -1.0, 0.0, *(_REACH_LOW * cube_in_state)),
            state_high=(*_REACH_HIGH, 1.0, 0.9, *(_REACH_HIGH * cube_in_state)),
            action_names=("dx", "dy", "dz", "grip"),
            action_low=(-STEP_LIMIT, -STEP_LIMIT, -STEP_LIMIT, -1.0),
            action_high=(STEP_LIMIT, STEP_LIMIT, STEP_LIMIT, 1.0),
            control_hz=10.0,
            max_ticks=50,
        )
        super().__init__(self._env.model, self._env.data, spec, {c: _CAMERAS[c] for c in cameras}, renderer)

    @property
    def cube_position(self) -> np.ndarray:
        """float64[3], metres; privileged."""
        return self._data.sensor("block_pos").data.copy()

    @property
    def tcp_position(self) -> np.ndarray:
        """float64[3], the point between the finger tips, metres."""
        return self._data.sensor("2f85/pinch_pos").data.copy()

    def expert(self) -> PickExpert:
        return PickExpert(self, _GRASP)

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        with _global_seed(seed):
            self._env.reset(seed=seed)
        self._begin(seed, actuator_noise)
        return self._observe()

    def step(self, action: np.ndarray) -> StepResult:
        """Execute one action for 0.1 s of simulated time."""
        move = self._disturbed(self._clipped(action))
        grip = 1.0 if move[3] > 0 else -1.0  # gym-hil adds this to an opening in [0, 1]: fully closed or open
        _, reward, terminated, _, info = self._env.step(np.array([*move[:3], 0.0, 0.0, 0.0, grip], np.float32))
        return self._stepped(reward, terminated, info["succeed"])

    def _state(self) -> np.ndarray:
        command = self._data.ctrl[self._gripper] / _GRIPPER_MAX * 2.0 - 1.0
        cube = self.cube_position if self._cube_in_state else ()
        return np.array([*self.tcp_position, command, self._data.qpos[self._finger], *cube], np.float32)


class _NoRenderer:
    """gym-hil's constructor makes a GL renderer even when no images are asked for; machines without GL have none."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def render(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """gym-hil draws the cube's place from numpy's global generator; leave that as it was found."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
