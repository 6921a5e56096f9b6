"""PickEnv: pick the cube up and lift it. Called by the actor loop; 4-D Cartesian actions in, images and state out.

The action is `(dx, dy, dz, gripper)`: metres per 10 Hz tick, at most 0.025 each, and a gripper command in [-1, 1] that
closes when positive. An episode ends in success when the cube is lifted 10 cm, in failure when it left the
reach of the hand, and is truncated after 60 ticks.
"""

from collections.abc import Sequence

import mujoco
import numpy as np

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.pick.scene import CUBE_HALF, FINGER_TRAVEL, SCENE
from serl_robot_infra.envs.pick_expert import Grasp, PickExpert
from serl_robot_infra.envs.simulated import SimulatedEnv
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

STEP_LIMIT = 0.025
"""Largest commanded translation of one tick, metres per axis."""

SUCCESS_HEIGHT = 0.12
"""Height of the cube's centre that counts as lifted: 10 cm above its rest, metres."""

_CUBE_SPREAD = 0.13
_OUT_OF_REACH = 0.28
# The set-point never runs further than this ahead of the hand, or a blocked hand would wind up and shoot off later.
_LEAD_LIMIT = 0.04
_PHYSICS_STEPS = 25  # of 4 ms: one 10 Hz tick
_GRASP = Grasp(hover=0.07, over=0.008, level=0.03, around=0.03, depth=0.006, slipped=0.03)


class PickEnv(SimulatedEnv):
    """The default simulated task; answers `envs.base.ScriptedEnvironment`.

    image_size: side of the square images, pixels. cameras: which of `front` and `wrist` to render; none for a task of
    states alone. max_ticks: length of an episode without success, ticks of 0.1 s. cube_in_state: the state ends in the
    cube's position, for tasks without pictures. ValueError: no such camera.
    """

    def __init__(
        self,
        image_size: int = 64,
        cameras: Sequence[str] = ("front", "wrist"),
        renderer: str = "ray",
        prompt: str = "pick up the red cube",
        max_ticks: int = 60,
        cube_in_state: bool = False,
    ):
        model = mujoco.MjModel.from_xml_string(SCENE)
        known = [model.camera(i).name for i in range(model.ncam)]
        for camera in cameras:
            if camera not in known:
                raise ValueError(f"cameras: the pick scene has {known}, got {camera!r}")
        self._cube_in_state = cube_in_state
        cube = ("cube_x", "cube_y", "cube_z") if cube_in_state else ()
        spec = TaskSpec(
            name="pick",
            prompt=prompt,
            cameras={camera: (image_size, image_size) for camera in cameras},
            state_names=("x", "y", "z", "opening", "grip_command", *cube),
            state_low=(-0.22, -0.22, 0.0, 0.0, -1.0, *(-0.22, -0.22, 0.0)[: len(cube)]),
            state_high=(0.22, 0.22, 0.4, 1.0, 1.0, *(0.22, 0.22, 0.4)[: len(cube)]),
            action_names=("dx", "dy", "dz", "grip"),
            action_low=(-STEP_LIMIT, -STEP_LIMIT, -STEP_LIMIT, -1.0),
            action_high=(STEP_LIMIT, STEP_LIMIT, STEP_LIMIT, 1.0),
            control_hz=10.0,
            max_ticks=max_ticks,
        )
        super().__init__(model, mujoco.MjData(model), spec, {camera: camera for camera in cameras}, renderer)

    @property
    def cube_position(self) -> np.ndarray:
        """float64[3], metres; privileged, for the expert and for tests."""
        return self._data.qpos[5:8].copy()

    @property
    def tcp_position(self) -> np.ndarray:
        """float64[3], the point between the finger tips, metres."""
        return self._data.site("tcp").xpos.copy()

    def expert(self) -> PickExpert:
        return PickExpert(self, _GRASP)

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        self._begin(seed, actuator_noise)
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[5:7] = rng.uniform(-_CUBE_SPREAD, _CUBE_SPREAD, 2)
        self._data.qpos[7] = CUBE_HALF
        self._data.qpos[:3] = rng.uniform([-0.05, -0.05, 0.0], [0.05, 0.05, 0.08])
        self._data.ctrl[:3] = self._data.qpos[:3]
        self._data.ctrl[3:] = 0.0
        mujoco.mj_forward(self._model, self._data)
        return self._observe()

    def step(self, action: np.ndarray) -> StepResult:
        """Execute one action for 0.1 s of simulated time."""
        self._command(self._disturbed(self._clipped(action)))
        mujoco.mj_step(self._model, self._data, _PHYSICS_STEPS)
        cube = self.cube_position
        success = cube[2] > SUCCESS_HEIGHT
        lost = np.abs(cube[:2]).max() > _OUT_OF_REACH
        return self._stepped(success, success or lost, success)

    def _command(self, action: np.ndarray) -> None:
        control, hand = self._data.ctrl, self._data.qpos[:3]
        limits = self._model.actuator_ctrlrange[:3]
        target = np.clip(control[:3] + action[:3], limits[:, 0], limits[:, 1])
        control[:3] = np.clip(target, hand - _LEAD_LIMIT, hand + _LEAD_LIMIT)
        control[3:] = FINGER_TRAVEL if action[3] > 0 else 0.0

    def _state(self) -> np.ndarray:
        opening = 1.0 - self._data.qpos[3] / FINGER_TRAVEL
        command = self._data.ctrl[3] / FINGER_TRAVEL * 2.0 - 1.0
        cube = self.cube_position if self._cube_in_state else ()
        return np.array([*self._data.site("tcp").xpos, opening, command, *cube], np.float32)
