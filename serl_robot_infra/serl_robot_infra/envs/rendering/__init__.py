"""Camera images of a MuJoCo scene on any machine: the renderers, and which of them suits this one."""

from serl_robot_infra.envs.rendering.choice import make_renderer

__all__ = ["make_renderer"]
