"""A task of Meta-World behind our interface: a Sawyer arm whose objects and goals differ in each episode.

Called by the actor loop like any environment; needs the `metaworld` extra. The action is `(dx, dy, dz, grip)`: metres
per tick and an effort in [-1, 1] that closes when positive. A tick is `repeat` of Meta-World's own 80 Hz steps, each of
which moves the hand's target by at most a centimetre; an episode ends at the first step that it calls a success.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np

from serl_config.nearest import nearest
from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.metaworld_carry import TASKS as CARRIED
from serl_robot_infra.envs.metaworld_carry import CarryScript
from serl_robot_infra.envs.simulated import SimulatedEnv
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

STEP_SIZE = 0.01
"""Largest translation of the hand's target in one of Meta-World's steps, metres per axis."""

STEP_HZ = 80.0
"""Rate of Meta-World's steps: five physics steps of 2.5 ms."""

HAND_LOW, HAND_HIGH = (-0.525, 0.348, -0.0525), (0.525, 1.025, 0.7)
"""Where the hand, and any goal, can be in any of its tasks, metres."""

# Our names for cameras of the model. `front` is moved nearer to the table, so that 64 pixels show a handle.
_CAMERAS = {"front": "corner2", "wrist": "gripperPOV"}
_FRONT_EYE, _FRONT_TARGET, _FRONT_FOVY = (0.65, 0.10, 0.55), (0.0, 0.68, 0.10), 44.0


class MetaWorldEnv(SimulatedEnv):
    """Answers `envs.base.ScriptedEnvironment`.

    Args:
        task: Meta-World's name, such as `drawer-open-v3`.
        cameras: which to render: `front`, `wrist`, or by the model's own names.
        image_size: side of the square images, pixels.
        repeat: Meta-World steps per tick.
        max_ticks: length of an episode without success.
        goal_in_state: append the goal's position to the state: for tasks whose goal is a mere marker, that no camera
            of ours shows.

    ImportError: Meta-World is not installed; ValueError: no such task or camera.
    """

    def __init__(
        self,
        task: str,
        prompt: str,
        cameras: Sequence[str] = ("front", "wrist"),
        image_size: int = 64,
        renderer: str = "ray",
        repeat: int = 4,
        max_ticks: int = 60,
        goal_in_state: bool = False,
    ):
        self._env, self._policy_class = _build(task)
        self._task, self._repeat, self._goal_in_state = task, int(repeat), goal_in_state
        self._grip = -1.0
        reach = STEP_SIZE * self._repeat
        goal = ("goal_x", "goal_y", "goal_z") if goal_in_state else ()
        spec = TaskSpec(
            name=f"metaworld-{task}",
            prompt=prompt,
            cameras={camera: (image_size, image_size) for camera in cameras},
            state_names=("x", "y", "z", "opening", "grip_command", *goal),
            state_low=(*HAND_LOW, 0.0, -1.0, *(HAND_LOW if goal else ())),
            state_high=(*HAND_HIGH, 1.0, 1.0, *(HAND_HIGH if goal else ())),
            action_names=("dx", "dy", "dz", "grip"),
            action_low=(-reach, -reach, -reach, -1.0),
            action_high=(reach, reach, reach, 1.0),
            control_hz=STEP_HZ / self._repeat,
            max_ticks=max_ticks,
        )
        model = self._env.model
        super().__init__(model, self._env.data, spec, {c: _find_camera(model, c) for c in cameras}, renderer)

    def privileged(self) -> np.ndarray:
        """float64[39], Meta-World's own observation: hand, gripper, objects, all of it one step ago, goal."""
        return self._env._get_obs()

    @property
    def has_own_operator(self) -> bool:
        """Whether `expert` is ours instead of Meta-World's."""
        return self._task in CARRIED

    def expert(self) -> "MetaWorldExpert":
        """The scripted operator of this task: ours where there is one."""
        if self.has_own_operator:
            return MetaWorldExpert(self, CarryScript(CARRIED[self._task], self._repeat))
        return self.script()

    def script(self) -> "MetaWorldExpert":
        """Meta-World's own scripted policy."""
        return MetaWorldExpert(self, self._policy_class())

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        self._env.seed(seed)
        self._env.reset()
        mujoco.mj_forward(self._model, self._data)  # Meta-World moves bodies after its last step
        self._begin(seed, actuator_noise)
        self._grip = -1.0
        return self._observe()

    def step(self, action: np.ndarray) -> StepResult:
        """Execute one action for one tick of simulated time, or up to the success."""
        move = self._disturbed(self._clipped(action))
        self._grip = float(move[3])
        success = False
        for _ in range(self._repeat):
            _, _, _, _, info = self._env.step(move / self._high)
            success = bool(info["success"])
            if success:
                break
        return self._stepped(success, success, success)

    def _state(self) -> np.ndarray:
        seen = self.privileged()
        return np.array([*seen[:4], self._grip, *(seen[-3:] if self._goal_in_state else ())], np.float32)


class MetaWorldExpert:
    """Answers `envs.base.Expert` with a scripted policy as Meta-World has them; these have no memory."""

    def __init__(self, env: MetaWorldEnv, policy: Any):
        self._env = env
        self._policy = policy

    def reset(self) -> None:
        """Nothing to forget."""

    def act(self) -> np.ndarray:
        """float32[4]: metres and grip, within the limits of the task."""
        low, high = np.asarray(self._env.spec.action_low), np.asarray(self._env.spec.action_high)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its gains ask for more than the limits by design
            wish = np.asarray(self._policy.get_action(self._env.privileged()), np.float64)
        return np.clip(wish * high, low, high).astype(np.float32)


def _build(task: str) -> tuple[Any, type]:
    """Meta-World's environment, drawing anew at each reset from the seed given before, and its scripted policy."""
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise ImportError(
            f"task=metaworld needs Meta-World ({error}): pip install --no-deps metaworld==3.0.0, or the extra "
            "'serl-robot-infra[metaworld]'"
        ) from None
    known: Mapping[str, type] = ALL_V3_ENVIRONMENTS
    if task not in known:
        hint = nearest(task, sorted(known), show=len(known))
        raise ValueError(f"task.env.task: Meta-World has no {task!r}{hint}")
    env = known[task]()
    # What its own benchmark classes set; a task object would freeze one draw for all episodes.
    env._set_task_called, env._partially_observable, env._freeze_rand_vec = True, False, False
    env.__dict__.pop("sawyer_observation_space", None)
    env.seeded_rand_vec = True
    env.max_path_length = 10**9  # this class counts the ticks
    return env, ENV_POLICY_MAP[task]


def _find_camera(model: mujoco.MjModel, name: str) -> str:
    """The model's camera behind a name, moved to its place."""
    known = {model.camera(i).name for i in range(model.ncam)}
    if name == "front":
        camera = model.camera(_CAMERAS[name])
        camera.pos, camera.quat = _FRONT_EYE, _towards(np.array(_FRONT_EYE), np.array(_FRONT_TARGET))
        camera.fovy = _FRONT_FOVY
    elif name not in known | _CAMERAS.keys():
        raise ValueError(f"cameras: Meta-World has {sorted(known | _CAMERAS.keys())}, got {name!r}")
    return _CAMERAS.get(name, name)


def _towards(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Quaternion of a camera at `eye` that looks at `target`, upright."""
    back = (eye - target) / np.linalg.norm(eye - target)  # a camera looks along -z
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, np.cross(back, right), back], axis=1).reshape(-1))
    return quat
