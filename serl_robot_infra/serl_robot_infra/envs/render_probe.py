"""What a GL back-end draws with here: `python -m serl_robot_infra.envs.render_probe egl|osmesa` prints its device.

Started by `rendering.choice` in a process of its own: a broken GL installation can abort rather than raise.
"""

import sys

import mujoco

from serl_robot_infra.envs.pick.scene import SCENE
from serl_robot_infra.envs.rendering.renderers import GlRenderer


def device_of(name: str) -> str:
    """What GL calls itself, once it has drawn the pick scene. RuntimeError where the image is blank."""
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = GlRenderer(model, 64, 64, name)
    if float(renderer.render(data, "front").std()) < 1.0:
        raise RuntimeError(f"renderer={name} draws blank images here")
    return renderer.device()


if __name__ == "__main__":
    print(device_of(sys.argv[1]))
