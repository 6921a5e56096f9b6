"""gym-hil's PandaPickCube behind our interface: a Franka arm under operational-space control, meshes from its wheel.

Called by the actor loop like any environment; needs the `hil` extra. The action is `(dx, dy, dz, grip)`: metres per
10 Hz tick, at most 0.025 each, and a gripper command in [-1, 1] that closes when positive.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mujoco
import numpy as np

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.rendering import make_renderer
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

STEP_LIMIT = 0.025
"""Largest commanded translation of one tick, metres per axis."""

_CAMERAS = {"front": "front", "wrist": "handcam_rgb"}
_GRIPPER_MAX = 255.0
_REACH_LOW, _REACH_HIGH = (0.2, -0.3, 0.0), (0.6, 0.3, 0.5)


class GymHilPickEnv:
    """Answers `envs.base.ScriptedEnvironment`.

    Args:
        image_size: side of the square images, pixels.
        renderer: `auto`, `egl`, `osmesa` or `ray` (see `envs.rendering`).
        prompt: the language instruction.
        cameras: which of `front` and `wrist` to render; none for a task of states alone.
        cube_in_state: append the cube's position to the state, for that task.

    Raises:
        ImportError: gym-hil is not installed.
        ValueError: no such camera.
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
        with _no_renderer():
            self._env = PandaPickCubeGymEnv(random_block_position=True)
        self._data = self._env.data
        self._renderer = make_renderer(self._env.model, image_size, image_size, renderer) if cameras else None
        self._cube_in_state = cube_in_state
        self._finger = self._env.model.joint("right_driver_joint").qposadr[0]
        self._gripper = self._env.model.actuator("fingers_actuator").id
        self._noise = 0.0
        self._noise_rng = np.random.default_rng(0)
        self._tick = 0
        self._spec = TaskSpec(
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

    @property
    def spec(self) -> TaskSpec:
        """The task's contract, equal to `task.spec` of the yaml."""
        return self._spec

    @property
    def renderer_name(self) -> str:
        """`egl`, `osmesa`, `ray` or `none`: images of different renderers differ."""
        return self._renderer.name if self._renderer else "none"

    @property
    def cube_position(self) -> np.ndarray:
        """float64[3], metres; privileged."""
        return self._data.sensor("block_pos").data.copy()

    @property
    def tcp_position(self) -> np.ndarray:
        """float64[3], the point between the finger tips, metres."""
        return self._data.sensor("2f85/pinch_pos").data.copy()

    def expert(self) -> "GymHilExpert":
        """A scripted expert that reads this environment's privileged state."""
        return GymHilExpert(self)

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        """Begin the episode that `seed` names; see `envs.base.Environment.reset`."""
        with _global_seed(seed):
            self._env.reset(seed=seed)
        self._noise_rng = np.random.default_rng([seed, 1])
        self._noise = float(actuator_noise)
        self._tick = 0
        return self._observe()

    def step(self, action: np.ndarray) -> StepResult:
        """Execute one action for 0.1 s of simulated time."""
        low, high = self._spec.action_low, self._spec.action_high
        move = np.clip(np.asarray(action, np.float64), low, high)
        grip = 1.0 if move[3] > 0 else -1.0  # gym-hil adds this to an opening in [0, 1]: fully closed or open
        move[:3] += self._noise_rng.normal(0.0, self._noise, 3) * STEP_LIMIT
        move = np.clip(move, low, high)
        _, reward, terminated, _, info = self._env.step(np.array([*move[:3], 0.0, 0.0, 0.0, grip], np.float32))
        self._tick += 1
        return StepResult(
            observation=self._observe(),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=not terminated and self._tick >= self._spec.max_ticks,
            success=bool(info["succeed"]),
        )

    def close(self) -> None:
        """Release the renderer."""
        if self._renderer:
            self._renderer.close()
            self._renderer = None

    def _observe(self) -> Observation:
        command = self._data.ctrl[self._gripper] / _GRIPPER_MAX * 2.0 - 1.0
        cube = self.cube_position if self._cube_in_state else ()
        state = np.array([*self.tcp_position, command, self._data.qpos[self._finger], *cube], np.float32)
        renderer = self._renderer
        images = {n: renderer.render(self._data, _CAMERAS[n]) for n in self._spec.cameras} if renderer else {}
        return Observation(images=images, state=state)


class GymHilExpert:
    """Hover over the cube, descend, close, lift; back to hovering when the cube slipped away."""

    def __init__(self, env: GymHilPickEnv):
        self._env = env
        self.reset()

    def reset(self) -> None:
        """Start from hovering, whatever the state of the episode."""
        self._phase = "hover"
        self._closing = 0

    def act(self) -> np.ndarray:
        """float32[4]: metres and gripper command."""
        to_cube = self._env.cube_position - self._env.tcp_position
        self._advance(to_cube)
        moves = {
            "hover": to_cube + np.array([0.0, 0.0, 0.08]),
            "descend": to_cube,
            "close": np.zeros(3),
            "lift": np.array([0, 0, 0.05]),
        }
        grip = 1.0 if self._phase in ("close", "lift") else -1.0
        return np.clip([*moves[self._phase], grip], self._env.spec.action_low, self._env.spec.action_high).astype(
            np.float32
        )

    def _advance(self, to_cube: np.ndarray) -> None:
        beside = float(np.linalg.norm(to_cube[:2]))
        if self._phase == "lift" and (beside > 0.04 or abs(to_cube[2]) > 0.04):
            self._phase = "hover"
        if self._phase == "hover" and beside < 0.01 and abs(to_cube[2] + 0.08) < 0.02:
            self._phase = "descend"
        if self._phase == "descend":
            if beside > 0.04:
                self._phase = "hover"
            elif abs(to_cube[2]) < 0.008 and beside < 0.01:
                self._phase, self._closing = "close", 0
        if self._phase == "close":
            self._closing += 1
            if self._closing > 4:
                self._phase = "lift"


@contextmanager
def _no_renderer() -> Iterator[None]:
    """gym-hil's constructor makes a GL renderer even when no images are asked for; machines without GL have none."""

    class Nothing:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def render(self) -> None: ...

        def close(self) -> None: ...

    before = mujoco.Renderer
    mujoco.Renderer = Nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        mujoco.Renderer = before


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """gym-hil draws the cube's place from numpy's global generator; leave that as it was found."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
