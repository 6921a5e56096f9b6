"""PickEnv: pick the cube up and lift it. Called by the actor loop; 4-D Cartesian actions in, images and state out.

The action is `(dx, dy, dz, gripper)`: metres per 10 Hz tick, at most 0.025 each, and a gripper command in [-1, 1] that
closes when positive. An episode ends in success when the cube is lifted 10 cm, in failure when it left the
reach of the hand, and is truncated after 60 ticks.
"""

from collections.abc import Sequence

import mujoco
import numpy as np

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.pick.expert import PickExpert
from serl_robot_infra.envs.pick.scene import CUBE_HALF, FINGER_TRAVEL, SCENE
from serl_robot_infra.envs.rendering import make_renderer
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


class PickEnv:
    """The default simulated task; answers `envs.base.ScriptedEnvironment`.

    Args:
        image_size: side of the square camera images, pixels.
        cameras: which of `front` and `wrist` to render; none for a state-only environment.
        renderer: `auto`, `egl`, `osmesa` or `ray` (see `envs.rendering`).
        actuator_noise: default of `reset`'s argument of that name.
        prompt: the language instruction.
        max_ticks: length of an episode without success, ticks of 0.1 s.
    """

    def __init__(
        self,
        image_size: int = 64,
        cameras: Sequence[str] = ("front", "wrist"),
        renderer: str = "auto",
        actuator_noise: float = 0.0,
        prompt: str = "pick up the red cube",
        max_ticks: int = 60,
    ):
        self._model = mujoco.MjModel.from_xml_string(SCENE)
        self._data = mujoco.MjData(self._model)
        known = [self._model.camera(i).name for i in range(self._model.ncam)]
        for camera in cameras:
            if camera not in known:
                raise ValueError(f"cameras: the pick scene has {known}, got {camera!r}")
        self._renderer = make_renderer(self._model, image_size, image_size, renderer) if cameras else None
        self._default_noise = float(actuator_noise)
        self._noise = self._default_noise
        self._noise_rng = np.random.default_rng(0)
        self._tick = 0
        self._spec = TaskSpec(
            name="pick",
            prompt=prompt,
            cameras={camera: (image_size, image_size) for camera in cameras},
            state_names=("x", "y", "z", "opening", "grip_command"),
            state_low=(-0.22, -0.22, 0.0, 0.0, -1.0),
            state_high=(0.22, 0.22, 0.4, 1.0, 1.0),
            action_names=("dx", "dy", "dz", "grip"),
            action_low=(-STEP_LIMIT, -STEP_LIMIT, -STEP_LIMIT, -1.0),
            action_high=(STEP_LIMIT, STEP_LIMIT, STEP_LIMIT, 1.0),
            control_hz=10.0,
            max_ticks=max_ticks,
        )
        self._low = np.asarray(self._spec.action_low)
        self._high = np.asarray(self._spec.action_high)

    @property
    def spec(self) -> TaskSpec:
        """The task's contract, equal to `task.spec` of the yaml."""
        return self._spec

    @property
    def renderer_name(self) -> str:
        """`egl`, `osmesa`, `ray` or `none`: images of different renderers differ, so it is recorded."""
        return self._renderer.name if self._renderer else "none"

    @property
    def cube_position(self) -> np.ndarray:
        """float64[3], metres; privileged, for the expert and for tests."""
        return self._data.qpos[5:8].copy()

    @property
    def tcp_position(self) -> np.ndarray:
        """float64[3], the point between the finger tips, metres."""
        return self._data.site("tcp").xpos.copy()

    def expert(self) -> PickExpert:
        """A scripted expert that reads this environment's privileged state."""
        return PickExpert(self)

    def reset(self, seed: int, *, actuator_noise: float | None = None) -> Observation:
        """Begin the episode that `seed` names; see `envs.base.Environment.reset`."""
        rng = np.random.default_rng(seed)
        # A stream of its own: the scene of a seed is the same with and without noise.
        self._noise_rng = np.random.default_rng([seed, 1])
        self._noise = self._default_noise if actuator_noise is None else float(actuator_noise)
        self._tick = 0
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
        self._command(self._disturb(np.clip(np.asarray(action, np.float64), self._low, self._high)))
        mujoco.mj_step(self._model, self._data, _PHYSICS_STEPS)
        self._tick += 1
        cube = self.cube_position
        success = bool(cube[2] > SUCCESS_HEIGHT)
        lost = bool(np.abs(cube[:2]).max() > _OUT_OF_REACH)
        terminated = success or lost
        return StepResult(
            observation=self._observe(),
            reward=float(success),
            terminated=terminated,
            truncated=not terminated and self._tick >= self._spec.max_ticks,
            success=success,
        )

    def close(self) -> None:
        """Release the renderer."""
        if self._renderer:
            self._renderer.close()
            self._renderer = None

    def _disturb(self, action: np.ndarray) -> np.ndarray:
        if self._noise == 0.0:
            return action
        noisy = action.copy()
        noisy[:3] += self._noise_rng.normal(0.0, self._noise, 3) * STEP_LIMIT
        return np.clip(noisy, self._low, self._high)

    def _command(self, action: np.ndarray) -> None:
        control, hand = self._data.ctrl, self._data.qpos[:3]
        limits = self._model.actuator_ctrlrange[:3]
        target = np.clip(control[:3] + action[:3], limits[:, 0], limits[:, 1])
        control[:3] = np.clip(target, hand - _LEAD_LIMIT, hand + _LEAD_LIMIT)
        control[3:] = FINGER_TRAVEL if action[3] > 0 else 0.0

    def _observe(self) -> Observation:
        opening = 1.0 - self._data.qpos[3] / FINGER_TRAVEL
        command = self._data.ctrl[3] / FINGER_TRAVEL * 2.0 - 1.0
        state = np.array([*self._data.site("tcp").xpos, opening, command], np.float32)
        images = (
            {camera: self._renderer.render(self._data, camera) for camera in self._spec.cameras}
            if self._renderer
            else {}
        )
        return Observation(images=images, state=state)
