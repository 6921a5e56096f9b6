"""Renderers: the ray renderer against GL where GL works here, and the choice."""

import mujoco
import numpy as np
import pytest

from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.envs.rendering import choice, make_renderer
from serl_robot_infra.envs.rendering.renderers import RayRenderer


def test_rays_see_a_sphere_where_the_camera_says():
    # A unit sphere 5 m ahead of a 90 degree camera fills asin(1/5) of the 45 degrees to each side.
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><camera name="c" pos="0 0 5" fovy="90"/>'
        '<geom size="1" rgba="1 0 0 1"/></worldbody></mujoco>'
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    image = RayRenderer(model, 100, 200).render(data, "c")
    assert image.shape == (100, 200, 3)
    hit = image[..., 2] == 0
    radius = np.tan(np.arcsin(1 / 5)) * 50  # pixels
    assert hit.sum() == pytest.approx(np.pi * radius**2, rel=0.05)
    rows, columns = np.nonzero(hit)
    assert rows.mean() == pytest.approx(49.5, abs=0.5)
    assert columns.mean() == pytest.approx(99.5, abs=0.5)
    assert tuple(image[0, 0]) == (114, 153, 191)  # sky


def test_a_textured_material_has_its_mean_colour():
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><asset>"
        '<texture name="t" type="2d" builtin="checker" rgb1="1 0 0" rgb2="0 0 1" width="64" height="64"/>'
        '<material name="m" texture="t"/></asset><worldbody><camera name="c" pos="0 0 3"/>'
        '<geom type="plane" size="9 9 1" material="m"/></worldbody></mujoco>'
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    red, green, blue = RayRenderer(model, 4, 4).render(data, "c")[0, 0].astype(int)
    assert red == pytest.approx(blue, abs=2)
    assert red > 100
    assert green == 0


@pytest.mark.parametrize("name", ["egl", "osmesa"])
def test_gl_and_rays_agree_about_the_scene(name):
    if choice.gl_device(name) is None:
        pytest.skip(f"{name} does not work on this machine")
    gl, ray = PickEnv(renderer=name), PickEnv(renderer="ray")
    try:
        assert gl.renderer_name == name
        for seed in range(3):
            a, b = gl.reset(seed), ray.reset(seed)
            for camera in a.images:
                difference = np.abs(a.images[camera].astype(int) - b.images[camera].astype(int))
                assert difference.mean() < 8  # edges and shading differ a little
                assert a.images[camera].std() > 10
    finally:
        gl.close()
        ray.close()


@pytest.mark.parametrize(
    ("device", "chosen"),
    [("NVIDIA L4/PCIe/SSE2", "egl"), ("llvmpipe (LLVM 15.0.6, 256 bits)", "ray"), (None, "ray")],
)
def test_auto_takes_a_gpu_where_there_is_one_and_rays_elsewhere(monkeypatch, device, chosen):
    monkeypatch.setattr(choice, "gl_device", {"egl": device}.get)
    assert choice.choose.__wrapped__() == chosen


def test_a_broken_gl_in_the_child_is_no_device(monkeypatch):
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")
    assert choice.gl_device("no-such-renderer") is None


def test_unknown_renderer_lists_the_known_ones():
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    with pytest.raises(ValueError, match="expected one of auto, egl, osmesa, ray, got 'gl'"):
        make_renderer(model, 8, 8, "gl")
