"""Three renderers behind one interface. Made by `choice.make_renderer`; a MuJoCo model and its state in, pixels out.

`egl` (a GPU, or Mesa's software rasteriser), `osmesa` (software), and `ray` (`mj_multiRay` with simple shading:
MuJoCo's own CPU code, without any GL library).
"""

import atexit
import importlib
from typing import Protocol

import mujoco
import numpy as np

_SKY = np.array([0.45, 0.60, 0.75])
_LIGHT = np.array([0.30, 0.20, 0.93])
_VISIBLE_GROUPS = np.array([1, 1, 1, 0, 0, 0], np.uint8)


class Renderer(Protocol):
    """Renders the named cameras of one model at one size."""

    name: str

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """uint8[h, w, 3], a new array."""
        ...

    def close(self) -> None:
        """Release the context; idempotent."""
        ...


def named_renderer(model: mujoco.MjModel, height: int, width: int, name: str) -> Renderer:
    """The renderer called `name`: egl, osmesa or ray. Raises ValueError where it does not work on this machine."""
    if name == "ray":
        return RayRenderer(model, height, width)
    try:
        return GlRenderer(model, height, width, name)
    except Exception as error:  # GL bindings raise anything from ImportError to AttributeError
        raise ValueError(f"renderer={name} does not work on this machine ({error}); use renderer=ray") from error


class RayRenderer:
    """One ray per pixel, Lambert shading, flat colours, read once. Pure CPU and the same everywhere."""

    name = "ray"

    def __init__(self, model: mujoco.MjModel, height: int, width: int):
        self._model = model
        self._shape = (height, width)
        pixels = height * width
        self._geoms = np.zeros(pixels, np.int32)
        self._distance = np.zeros(pixels)
        self._normals = np.zeros((pixels, 3))
        # One row more, so that a miss (id -1) indexes the sky.
        self._colours = np.vstack([*(_flat_colour(model, geom) for geom in range(model.ngeom)), _SKY]) * 255.0
        self._rays = {model.camera(i).name: self._camera_rays(i) for i in range(model.ncam)}

    def _camera_rays(self, camera: int) -> np.ndarray:
        """float64[h·w, 3]: unit rays in the frame of the camera, which looks along -z."""
        height, width = self._shape
        half = np.tan(np.deg2rad(self._model.cam_fovy[camera]) / 2)
        y = (1 - (np.arange(height) + 0.5) / height * 2) * half
        x = ((np.arange(width) + 0.5) / width * 2 - 1) * half * width / height
        rays = np.stack([*np.meshgrid(x, y), np.full(self._shape, -1.0)], axis=-1).reshape(-1, 3)
        return rays / np.linalg.norm(rays, axis=1, keepdims=True)

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """uint8[h, w, 3] of the named camera; needs the positions of `mj_forward` or `mj_step`."""
        index = self._model.camera(camera).id
        rays = np.ascontiguousarray(self._rays[camera] @ data.cam_xmat[index].reshape(3, 3).T)
        mujoco.mj_multiRay(
            self._model, data, data.cam_xpos[index], rays.reshape(-1), _VISIBLE_GROUPS, 1, -1,
            self._geoms, self._distance, self._normals.reshape(-1), len(self._geoms), 1e3,
        )  # fmt: skip
        shade = 0.35 + 0.65 * np.abs(self._normals @ _LIGHT)
        shade[self._geoms < 0] = 1.0
        image = self._colours[self._geoms] * shade[:, None]
        return np.minimum(image, 255.0).astype(np.uint8).reshape(*self._shape, 3)

    def close(self) -> None:
        """Nothing to release."""


def _flat_colour(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """float64[3] in [0, 1]: the geom's colour, or its material's, times the mean of its texture."""
    material = model.geom_matid[geom]
    if material < 0:
        return model.geom_rgba[geom, :3].astype(np.float64)
    colour = model.mat_rgba[material, :3].astype(np.float64)
    texture = model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB.value]
    if texture < 0:
        return colour
    start, channels = model.tex_adr[texture], model.tex_nchannel[texture]
    texels = model.tex_data[start : start + model.tex_height[texture] * model.tex_width[texture] * channels]
    return colour * texels.reshape(-1, channels)[:, :3].mean(axis=0) / 255.0


class GlRenderer:
    """MuJoCo's rasteriser in an off-screen EGL or OSMesa context, without shadows and multisampling.

    The model's visual quality is lowered, which makes software GL some 50 times faster.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int, name: str):
        self.name = name
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        self._model = model
        self._shape = (height, width)
        self._context = importlib.import_module(f"mujoco.{name}").GLContext(width, height)
        atexit.register(self.close)  # a context that outlives its library's own exit handler complains
        self._context.make_current()
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + 100)
        self._options = mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def device(self) -> str:
        """What GL calls itself, such as `llvmpipe (LLVM 19.1.7, 256 bits)` or a GPU's name."""
        from OpenGL import GL

        self._context.make_current()
        return (GL.glGetString(GL.GL_RENDERER) or b"unknown").decode(errors="replace")

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """uint8[h, w, 3] of the named camera."""
        height, width = self._shape
        self._context.make_current()
        self._view.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._view, everything, self._scene)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._mjr)
        image = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, self._mjr)
        return image[::-1].copy()  # GL counts rows from the bottom

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.make_current()
            self._mjr.free()
            self._context.free()
            self._context = None
            atexit.unregister(self.close)
