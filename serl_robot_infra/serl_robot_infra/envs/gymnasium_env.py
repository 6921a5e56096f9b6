"""Any Gymnasium id as an environment, by yaml: where its images, its state and its success are is said by name.

    observation ─▶ state: [observation, desired_goal[0:3]], joined in this order
                ─▶ cameras: {front: pixels/top | render | camera:<of the MuJoCo model>}
    action float32[ad] in the task's units ─▶ linearly onto the box of the environment's action_space
    info ─▶ success: is_success

Called by the actor loop like any environment; the package that registers the id is imported by `<package>:<id>`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from serl_config.nearest import nearest
from serl_robot_infra.envs.base import Expert, StepResult
from serl_robot_infra.envs.images import fitted, shape_refusal
from serl_robot_infra.envs.rendering import make_renderer
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

_SLICE = re.compile(r"^(.*?)(?:\[(\d+):(\d+)\])?$")


class GymnasiumEnv:
    """Answers `envs.base.ScriptedEnvironment` where `expert` is named.

    Args:
        spec: `${task.spec}`.
        id: of the environment, with its package: `gymnasium_robotics:FetchReach-v4`.
        kwargs: for its constructor.
        state: which of the observation's keys make up the state, in order, whole or `key[a:b]`; nested ones as `a/b`;
            None: the observation itself, a box.
        cameras: name -> the observation's key of an image, `render` (the environment's own picture), or
            `camera:<name>` of its MuJoCo model, drawn by `renderer`.
        success: key of `info` that says that the task is solved, which ends the episode; `terminated`: the
            environment's own end is one.
        reward: `success` (1 at the success, else 0) or `environment` (its own).
        noise_dims: which actions a disturbance is added to; None: all.
        expert: makes the scripted operator, called with env= (`_partial_: true` in yaml).

    Raises ValueError for a name, size or limit that does not fit, ImportError for a package that is not installed.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        id: str,
        kwargs: Mapping[str, Any] | None = None,
        state: Sequence[str] | None = None,
        cameras: Mapping[str, str] | None = None,
        success: str = "is_success",
        reward: str = "success",
        renderer: str = "ray",
        noise_dims: Sequence[int] | None = None,
        expert: Callable[..., Expert] | None = None,
    ):
        self.spec = TaskSpec.from_dict(_plain(spec))
        self._sources, self._cameras = list(state or [""]), dict(_plain(cameras) or {})
        self._success, self._reward, self._expert = success, reward, expert
        self._noise_dims = list(range(self.spec.action_dim) if noise_dims is None else noise_dims)
        if reward not in ("success", "environment"):
            raise ValueError(f"task.env.reward: expected success or environment, got {reward!r}")
        if set(self._cameras) != set(self.spec.cameras):
            raise ValueError(
                f"task.env.cameras: expected {sorted(self.spec.cameras)} as task.spec, got {sorted(self._cameras)}"
            )
        self._env = self._make(id, dict(_plain(kwargs) or {}))
        self._low, self._high = np.asarray(self.spec.action_low), np.asarray(self.spec.action_high)
        self._box_low, self._box_high = _box(self._env.action_space, self.spec)
        _check_rate(self._env, self.spec)
        self._renderers = self._make_renderers(renderer)
        self.raw: Any = None  # the environment's own last observation; privileged
        self._check(self.reset(0))

    @property
    def renderer_name(self) -> str:
        """As `SimulatedEnv`: images of different renderers differ."""
        made = next(iter(self._renderers.values()), None)
        return made.name if made else "its own" if self._cameras else "none"

    def expert(self) -> Expert:
        """The scripted operator; ValueError where none is named."""
        if self._expert is None:
            raise ValueError(
                "task.env.expert: none is named for this environment; set task.operator or rollout.operator=false"
            )
        return self._expert(env=self)

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        # A stream of its own: the scene of a seed is the same with and without noise.
        self._noise, self._rng = float(actuator_noise), np.random.default_rng([seed, 1])
        self._tick = 0
        self.raw, _ = self._env.reset(seed=seed)
        return self._observe()

    def step(self, action: np.ndarray) -> StepResult:
        """Execute float32[ad], in the task's units."""
        move = np.clip(np.asarray(action, np.float64), self._low, self._high)
        if self._noise:
            low, high = self.spec.full_moves()
            span = (high - low) / 2.0
            move[self._noise_dims] += self._rng.normal(0.0, self._noise, len(self._noise_dims)) * span[self._noise_dims]
            move = np.clip(move, self._low, self._high)
        share = (move - self._low) / (self._high - self._low)
        space = self._env.action_space
        wish = (self._box_low + share * (self._box_high - self._box_low)).astype(space.dtype).reshape(space.shape)
        self.raw, reward, ended, late, info = self._env.step(wish)
        self._tick += 1
        ended = bool(np.ravel(_array(ended))[0])
        success = ended if self._success == "terminated" else self._said(info)
        earned = float(success) if self._reward == "success" else np.ravel(_array(reward))[0]  # the actor checks it
        ended = ended or success
        late = bool(np.ravel(_array(late))[0]) or self._tick >= self.spec.max_ticks
        return StepResult(self._observe(), earned, ended, late and not ended, success)

    def close(self) -> None:
        """Release the renderers and the environment; idempotent."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}
        self._env.close()

    def _make(self, id: str, kwargs: dict[str, Any]) -> Any:
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError(
                f"task.env.id={id} needs gymnasium ({error}): pip install 'serl-robot-infra[robotics]'"
            ) from None
        if "render" in self._cameras.values():
            kwargs = {"render_mode": "rgb_array"} | kwargs
        try:
            return gymnasium.make(id, max_episode_steps=self.spec.max_ticks, **kwargs)
        except gymnasium.error.Error as error:
            known = [name.partition("-v")[0] for name in gymnasium.registry]
            raise ValueError(f"task.env.id: {' '.join(str(error).split())}{nearest(id, known, show=0)}") from None
        except ImportError as error:
            raise ImportError(f"task.env.id={id}: {error}; install its package, docs/robot.md") from None

    def _make_renderers(self, renderer: str) -> dict[str, Any]:
        """One for each size of the cameras of the MuJoCo model."""
        made: dict[str, Any] = {}
        for camera, source in self._cameras.items():
            if source.startswith("camera:"):
                model = getattr(self._env.unwrapped, "model", None)
                if model is None:
                    raise ValueError(f"task.env.cameras.{camera}: {source} needs a MuJoCo model, which this id has not")
                names = [model.camera(index).name for index in range(model.ncam)]
                if (name := source.removeprefix("camera:")) not in names:
                    raise ValueError(f"task.env.cameras.{camera}: no camera {name!r}{nearest(name, names, show=40)}")
                made[camera] = make_renderer(model, *self.spec.cameras[camera], renderer)
        return made

    def _said(self, info: Mapping[str, Any]) -> bool:
        value: Any = info
        for key in self._success.split("/"):
            if key not in value:
                raise ValueError(f"task.env.success: info has no {self._success!r}{nearest(key, list(value), show=40)}")
            value = value[key]
        said = np.ravel(_array(value))[0]
        if said not in (0, 1):  # bool(nan) would be a success
            raise ValueError(f"task.env.success: expected {self._success!r} of info to be true or false, got {value!r}")
        return bool(said)

    def _observe(self) -> Observation:
        state = np.concatenate([_part(self.raw, source) for source in self._sources])
        return Observation({camera: self._image(camera, source) for camera, source in self._cameras.items()}, state)

    def _image(self, camera: str, source: str) -> np.ndarray:
        if camera in self._renderers:
            return self._renderers[camera].render(self._env.unwrapped.data, source.removeprefix("camera:"))
        image = _array(self._env.render() if source == "render" else _lookup(self.raw, source, "cameras"))
        image = image[0] if image.ndim == 4 and len(image) == 1 else image
        if refusal := shape_refusal(camera, image.shape, self.spec.cameras[camera]):
            raise ValueError(refusal)
        return fitted(image, self.spec.cameras[camera], camera)

    def _check(self, seen: Observation) -> None:
        """The spec against what really comes; ValueError names the first difference."""
        if len(seen.state) != self.spec.state_dim:
            raise ValueError(
                f"task.env.state: expected {self.spec.state_dim} numbers (task.spec.state_names), got {len(seen.state)}"
            )
        self.spec.check_observation(seen)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _array(value: Any) -> np.ndarray:
    """Also of a tensor, on whatever device."""
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)


def _lookup(raw: Any, path: str, what: str) -> Any:
    for key in filter(None, path.split("/")):
        if not isinstance(raw, Mapping) or key not in raw:
            known = list(raw) if isinstance(raw, Mapping) else []
            raise ValueError(f"task.env.{what}: the observation has no {path!r}{nearest(key, known, show=40)}")
        raw = raw[key]
    return raw


def _part(raw: Any, source: str) -> np.ndarray:
    """float32[n] of the state: `key`, `a/b` or `key[0:3]`."""
    match = _SLICE.match(source)
    assert match is not None
    path, start, stop = match.groups()
    value = _lookup(raw, path, "state")
    if isinstance(value, Mapping):
        raise ValueError(f"task.env.state: name keys of the observation: {', '.join(value)}")
    numbers = _array(value).astype(np.float32).ravel()
    return numbers if start is None else numbers[int(start) : int(stop)]


def _box(space: Any, spec: TaskSpec) -> tuple[np.ndarray, np.ndarray]:
    """float64[ad] limits of the environment's own actions."""
    if not hasattr(space, "low"):
        raise ValueError(f"task.env.id: expected an action_space that is a Box, got {space}")
    low, high = np.asarray(space.low, np.float64).ravel(), np.asarray(space.high, np.float64).ravel()
    if len(low) != spec.action_dim:
        raise ValueError(f"task.spec.action_names: expected {len(low)}, as the action_space has, got {spec.action_dim}")
    if not np.isfinite([low, high]).all():
        raise ValueError(f"task.env.id: expected an action_space with finite limits, got {space}")
    return low, high


def _check_rate(env: Any, spec: TaskSpec) -> None:
    step = getattr(env.unwrapped, "dt", None)
    if isinstance(step, float) and step > 0 and abs(1.0 / step - spec.control_hz) > 0.01 * spec.control_hz:
        raise ValueError(
            f"task.spec.control_hz: expected {1.0 / step:g}, a step of this id is {step:g} s, got {spec.control_hz:g}"
        )
