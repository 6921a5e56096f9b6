"""Which renderer suits this machine: `choose()` for `renderer=auto`, and `python -m ...render_probe <name>`, its child.

Each GL back-end is tried in a process of its own, since a broken GL installation can abort rather than raise. The child
renders the pick scene as the default task does (64 px, two cameras) and prints its CPU time per tick, threads included
(software GL spreads over all cores, which wall time would hide). The verdict is cached in a file.
"""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

_SIZE = 64
_CAMERAS = ("front", "wrist")
_REPEATS = 20
_CHILD_TIMEOUT_S = 30.0
# Software GL is taken only where the ray renderer is dear. Below this its saving is nothing beside one inference, and
# images that are equal on every machine are worth more. On two cores: egl (llvmpipe) 0.5 ms, ray 0.9 ms.
_DEAR_MS = 3.0
_OSMESA = ("usr/lib/libOSMesa.so*", "usr/lib64/libOSMesa.so*", "usr/lib/*/libOSMesa.so*")
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")


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
    command = [sys.executable, "-m", "serl_robot_infra.envs.render_probe", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYOPENGL_PLATFORM", None)  # set by the back-end that was imported first
    try:
        done = subprocess.run(command, capture_output=True, timeout=_CHILD_TIMEOUT_S, env=environment, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None


def measure(name: str) -> dict:
    """CPU milliseconds, over all threads, for one tick's images of the pick scene; run in the child."""
    import mujoco

    from serl_robot_infra.envs.pick.scene import SCENE
    from serl_robot_infra.envs.rendering import GlRenderer, make_renderer

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = make_renderer(model, _SIZE, _SIZE, name)
    images = [renderer.render(data, camera) for camera in _CAMERAS]
    if min(float(image.std()) for image in images) < 1.0:
        raise RuntimeError(f"renderer={name} draws blank images here")
    start = time.process_time()
    for _ in range(_REPEATS):
        for camera in _CAMERAS:
            renderer.render(data, camera)
    cpu_ms = (time.process_time() - start) / _REPEATS * 1e3
    return {"cpu_ms": round(cpu_ms, 3), "device": renderer.device() if isinstance(renderer, GlRenderer) else "cpu"}


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowserl" / "renderer.json"


def _machine() -> dict:
    """What the verdict depends on: another driver, device or MuJoCo asks for a new one."""
    import mujoco

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


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
