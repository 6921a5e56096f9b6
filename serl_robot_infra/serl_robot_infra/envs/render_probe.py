"""What one renderer costs on this machine: `python -m serl_robot_infra.envs.render_probe <name>` prints it as JSON.

Started by `rendering.choice` in a process of its own. It renders the pick scene as the default task does (64 px, two
cameras) and measures its CPU time per tick, threads included: software GL spreads over all cores; wall time hides that.
"""

import json
import sys
import time

import mujoco

from serl_robot_infra.envs.pick.scene import SCENE
from serl_robot_infra.envs.rendering.renderers import GlRenderer, named_renderer

_SIZE = 64
_CAMERAS = ("front", "wrist")
_REPEATS = 20


def measure(name: str) -> dict:
    """CPU milliseconds, over all threads, for one tick's images of the pick scene."""
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = named_renderer(model, _SIZE, _SIZE, name)
    images = [renderer.render(data, camera) for camera in _CAMERAS]
    if min(float(image.std()) for image in images) < 1.0:
        raise RuntimeError(f"renderer={name} draws blank images here")
    start = time.process_time()
    for _ in range(_REPEATS):
        for camera in _CAMERAS:
            renderer.render(data, camera)
    cpu_ms = (time.process_time() - start) / _REPEATS * 1e3
    return {"cpu_ms": round(cpu_ms, 3), "device": renderer.device() if isinstance(renderer, GlRenderer) else "cpu"}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
