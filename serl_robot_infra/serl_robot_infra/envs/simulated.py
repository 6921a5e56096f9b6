"""What the simulated tasks share: cameras of a MuJoCo model, the disturbance of an action, the count of ticks.

Extended by each environment of this folder; images and a StepResult flow out.
"""

from collections.abc import Mapping

import mujoco
import numpy as np

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.rendering import make_renderer
from serl_transport.contract.specs import Observation, TaskSpec


class SimulatedEnv:
    """Answers `envs.base.Environment` but for `reset` and `step`; a task says what its state is.

    Args:
        model, data: the scene.
        spec: the task's contract, equal to `task.spec` of the yaml. The first three actions are a translation.
        cameras: name in the spec -> the model's camera; none for a task of states alone. All of one size.
        renderer: `auto`, `egl`, `osmesa` or `ray` (see `envs.rendering`).
    """

    def __init__(
        self, model: mujoco.MjModel, data: mujoco.MjData, spec: TaskSpec, cameras: Mapping[str, str], renderer: str
    ):
        self._model, self._data, self._cameras = model, data, dict(cameras)
        self.spec = spec
        self._low, self._high = np.asarray(spec.action_low), np.asarray(spec.action_high)
        self._renderer = make_renderer(model, *spec.cameras[next(iter(cameras))], renderer) if cameras else None
        self._begin(0, 0.0)

    @property
    def renderer_name(self) -> str:
        """`egl`, `osmesa`, `ray` or `none`: images of different renderers differ, so it is told at the start."""
        return self._renderer.name if self._renderer else "none"

    def close(self) -> None:
        """Release the renderer."""
        if self._renderer:
            self._renderer.close()
            self._renderer = None

    def _state(self) -> np.ndarray:
        """float32[s], what the robot senses now."""
        raise NotImplementedError

    def _begin(self, seed: int, actuator_noise: float) -> None:
        """An episode begins."""
        # A stream of its own: the scene of a seed is the same with and without noise.
        self._noise, self._noise_rng = float(actuator_noise), np.random.default_rng([seed, 1])
        self._tick = 0

    def _clipped(self, action: np.ndarray) -> np.ndarray:
        """float64[ad] within the limits."""
        return np.clip(np.asarray(action, np.float64), self._low, self._high)

    def _disturbed(self, action: np.ndarray) -> np.ndarray:
        """A clipped action as the robot executes it, float64[ad]: with the noise in its translation."""
        noise = self._noise_rng.normal(0.0, self._noise, 3) * self.spec.full_moves()[1, :3]
        return np.clip([*(action[:3] + noise), *action[3:]], self._low, self._high)

    def _observe(self) -> Observation:
        renderer = self._renderer
        images = {name: renderer.render(self._data, c) for name, c in self._cameras.items()} if renderer else {}
        return Observation(images=images, state=self._state())

    def _stepped(self, reward: float, terminated: bool, success: bool) -> StepResult:
        """A tick was executed."""
        self._tick += 1
        truncated = not terminated and self._tick >= self.spec.max_ticks
        return StepResult(self._observe(), float(reward), bool(terminated), truncated, bool(success))
