"""GPU, driver and torch; what a robot's devices need of this user; the simulations' renderer. For doctor.host.

Devices are looked at in /dev and not opened: whether one works is tools/check_robot.py's question.
"""

import glob
import grp
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from serl_robot_infra.check.report import Report

_TORCH_S = 90.0
_RENDER_S = 60.0
_ASK_TORCH = """
import json, torch
there = torch.cuda.is_available()
said = {"version": torch.__version__, "cuda": torch.version.cuda, "there": there, "archs": [], "gpus": []}
if there:
    said["archs"] = torch.cuda.get_arch_list()
    for k in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(k)
        said["gpus"].append([p.name, f"sm_{p.major}{p.minor}", p.total_memory >> 20])
print(json.dumps(said))
"""
_ASK_RENDERER = """
import mujoco
from serl_robot_infra.envs.rendering.choice import make_renderer
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><camera name='c' pos='0 0 1'/></worldbody></mujoco>")
renderer = make_renderer(model, 32, 32, "auto")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
assert renderer.render(data, "c").shape == (32, 32, 3)
print(renderer.name)
"""
# What a robot's part is called in /dev, and the group that may open it.
DEVICES = {
    "serial ports": (("/dev/ttyUSB*", "/dev/ttyACM*"), "dialout", "servo buses and leader arms"),
    "input devices": (("/dev/input/event*",), "input", "operator=gamepad and operator=spacemouse"),
    "cameras": (("/dev/video*",), "video", "cameras of a driver of ours and of LeRobot"),
}


def check_gpu(report: Report, has_torch: bool, needed: bool) -> None:
    """Driver, torch's CUDA build, and whether the two find each other. needed: this is a learner's host."""
    driver = nvidia_driver()
    if not has_torch:
        report.skip("torch", "not installed here: nothing of CUDA was looked at")
        return
    said, problem = _ask(_ASK_TORCH, _TORCH_S)
    if said is None:
        report.fail("torch", problem, "bash tools/bootstrap.sh learner")
        return
    found = json.loads(said)
    torch = f"torch {found['version']}, CUDA {found['cuda'] or 'none (a build for the CPU)'}"
    if found["there"]:
        _check_cards(report, torch, driver, found)
    elif driver is None:
        says = f"{torch}; no NVIDIA driver: training and serving run on the CPU"
        (report.warn if needed else report.ok)(
            "GPU", says, *(["a GPU for anything beyond tiny policies"] if needed else [])
        )
    elif found["cuda"] is None:
        fix = "VIRTUAL_ENV=.venv .venv/bin/uv pip install --torch-backend auto torch==<locked>"
        report.fail("GPU", f"driver {driver}, but {torch}", fix)
    else:
        fix = "a driver for that CUDA or newer; nvidia-smi; CUDA_VISIBLE_DEVICES; docker: --gpus all"
        report.fail("GPU", f"driver {driver}, {torch}, and torch finds no GPU", fix)


def _check_cards(report: Report, torch: str, driver: str | None, found: dict) -> None:
    for name, arch, memory in found["gpus"]:
        says = f"{name}, {memory >> 10} GB, driver {driver or '?'}; {torch}"
        built = found["archs"]
        if built and not any(arch[:-1] == other[:-1] for other in built):
            report.fail(
                "GPU", f"{says}; that torch is built for {', '.join(built)}, this is {arch}", "another torch build"
            )
        else:
            report.ok("GPU", says)


def nvidia_driver() -> str | None:
    """The kernel's NVIDIA driver; None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    try:
        words = path.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), "?")


def check_devices(report: Report) -> None:
    """Which devices there are, and whether this user may open them."""
    for what, (patterns, group, use) in DEVICES.items():
        paths = sorted(path for pattern in patterns for path in glob.glob(pattern))
        if not paths:
            report.skip(what, f"none in /dev ({use})")
            continue
        closed = [path for path in paths if not os.access(path, os.R_OK | os.W_OK)]
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        if closed:
            fix = f"sudo usermod -aG {_group_of(closed[0], group)} $USER, then log in anew; docker: --device"
            report.warn(what, f"{shown}; {len(closed)} of {len(paths)} may not be opened by this user ({use})", fix)
        else:
            report.ok(what, shown)
    if importable("evdev") is False:
        fix = "VIRTUAL_ENV=.venv .venv/bin/uv pip install 'evdev>=2'"
        report.warn("evdev", "not installed: operator=gamepad and operator=spacemouse need it", fix)


def _group_of(path: str, usual: str) -> str:
    try:
        return grp.getgrgid(os.stat(path).st_gid).gr_name
    except (KeyError, OSError):
        return usual


def check_renderer(report: Report) -> None:
    """What the simulations draw with here."""
    if importable("mujoco") is False:
        report.skip("renderer", "mujoco is not installed here: no simulation runs")
        return
    said, problem = _ask(_ASK_RENDERER, _RENDER_S)
    if said is None:
        report.fail("renderer", problem, "task.env.renderer=ray needs no GL library")
    else:
        how = " (MuJoCo's own on the CPU; egl is taken where a GPU draws)" if said == "ray" else ""
        report.ok("renderer", f"{said}{how}")


def importable(name: str) -> bool:
    """Is a package installed? Nothing of it is imported."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _ask(program: str, seconds: float) -> tuple[str | None, str]:
    """The last line that a program printed, or None and why. In a process of its own: what it loads may crash."""
    command: Sequence[str] = (sys.executable, "-c", program)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {seconds:g} s"
    lines, errors = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
    if done.returncode or not lines:
        return None, errors[-1] if errors else f"ended with {done.returncode}"
    return lines[-1], ""
