"""Which renderer draws: the one that yaml names, or for `renderer=auto` the one that suits this machine.

Called by the simulated environments. Each GL back-end is tried in a process of its own (`render_probe`), since a broken
GL installation can abort rather than raise; the verdict is cached in a file.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import mujoco

from serl_robot_infra.envs.rendering.renderers import Renderer, named_renderer

RENDERERS = ("auto", "egl", "osmesa", "ray")
_PROBE = "serl_robot_infra.envs.render_probe"
_CHILD_TIMEOUT_S = 30.0
# Software GL is taken only where the ray renderer is dear. Below this its saving is nothing beside one inference, and
# images that are equal on every machine are worth more. On two cores: egl (llvmpipe) 0.5 ms, ray 0.9 ms.
_DEAR_MS = 3.0
_OSMESA = ("usr/lib/libOSMesa.so*", "usr/lib64/libOSMesa.so*", "usr/lib/*/libOSMesa.so*")
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")


def make_renderer(model: mujoco.MjModel, height: int, width: int, name: str = "auto") -> Renderer:
    """The renderer called `name`; `auto` asks `choose`.

    Raises:
        ValueError: no renderer has this name, or it does not work on this machine.
    """
    if name not in RENDERERS:
        raise ValueError(f"renderer: expected one of {', '.join(RENDERERS)}, got {name!r}")
    return named_renderer(model, height, width, choose() if name == "auto" else name)


@functools.cache
def choose() -> str:
    """`egl`, `osmesa` or `ray`: a hardware EGL, else `ray` unless it is dear here and software GL is cheaper."""
    cached = _read_cache()
    if cached:
        return cached
    reports = {name: report for name in ("egl", "osmesa", "ray") if (report := probe(name))}
    name = pick(reports)
    _write_cache(name, reports)
    return name


def pick(reports: dict[str, dict]) -> str:
    """The decision, from `{name: {"cpu_ms": float, "device": str}}` of the renderers that work."""
    egl = reports.get("egl")
    if egl and not any(word in egl["device"].lower() for word in _SOFTWARE):
        return "egl"
    if not reports or ("ray" in reports and reports["ray"]["cpu_ms"] < _DEAR_MS):
        return "ray"
    return min(reports, key=lambda name: reports[name]["cpu_ms"])


def probe(name: str) -> dict | None:
    """Try one renderer in a child process: `{"cpu_ms", "device"}`, or None where it does not work."""
    command = [sys.executable, "-m", _PROBE, name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYOPENGL_PLATFORM", None)  # set by the back-end that was imported first
    try:
        done = subprocess.run(command, capture_output=True, timeout=_CHILD_TIMEOUT_S, env=environment, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowserl" / "renderer.json"


def _machine() -> dict:
    """What the verdict depends on: another driver, device or MuJoCo asks for a new one."""
    vendors = Path("/usr/share/glvnd/egl_vendor.d")
    return {
        "host": os.uname().nodename,
        "mujoco": mujoco.__version__,
        "vendors": sorted(path.name for path in vendors.glob("*.json")),
        "osmesa": sorted(str(path) for pattern in _OSMESA for path in Path("/").glob(pattern)),
        "devices": [os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("MUJOCO_EGL_DEVICE_ID")],
        "dri": sorted(path.name for path in Path("/dev/dri").glob("*")),
    }


def _read_cache() -> str | None:
    try:
        cache = json.loads(_cache_file().read_text())
        return cache["renderer"] if cache["machine"] == _machine() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no verdict yet, or not one of ours: measure again


def _write_cache(name: str, reports: dict[str, dict]) -> None:
    path = _cache_file()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"renderer": name, "machine": _machine(), "reports": reports}, indent=1))
        temporary.replace(path)
    except OSError:
        pass  # a read-only home only costs the probe again at the next start
