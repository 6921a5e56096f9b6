"""The default task: a parallel gripper picks a cube up. MuJoCo primitives only; nothing to download."""

from serl_robot_infra.envs.pick.env import PickEnv

__all__ = ["PickEnv"]
