"""Which renderer draws: the one that yaml names, or for `renderer=auto` the one that suits this machine.

Called by the simulated environments. GL is tried in a process of its own (`render_probe`), since a broken installation
can abort rather than raise.
"""

import functools
import os
import subprocess
import sys

import mujoco

from serl_robot_infra.envs.rendering.renderers import Renderer, named_renderer

RENDERERS = ("auto", "egl", "osmesa", "ray")
_PROBE = "serl_robot_infra.envs.render_probe"
_CHILD_TIMEOUT_S = 30.0
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")


def make_renderer(model: mujoco.MjModel, height: int, width: int, name: str) -> Renderer:
    """The renderer called `name`; `auto` asks `choose`.

    Raises:
        ValueError: no renderer has this name, or it does not work on this machine.
    """
    if name not in RENDERERS:
        raise ValueError(f"renderer: expected one of {', '.join(RENDERERS)}, got {name!r}")
    return named_renderer(model, height, width, choose() if name == "auto" else name)


@functools.cache
def choose() -> str:
    """`egl` where a GPU draws, else `ray`: about as quick as software GL, and its images are equal on every machine."""
    device = gl_device("egl")
    return "egl" if device and not any(word in device.lower() for word in _SOFTWARE) else "ray"


def gl_device(name: str) -> str | None:
    """What `egl` or `osmesa` draws with, tried in a child process (3 s); None where it does not work."""
    command = [sys.executable, "-m", _PROBE, name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYOPENGL_PLATFORM", None)  # set by the back-end that was imported first
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
