"""Actions that are poses relative to a pose of the state: composition of rotations, in place of a difference.

    T = (R, p) of 9 numbers: position, then the first two rows of the rotation matrix       relative  T_ref⁻¹ · T
                                                                                            absolute  T_ref · T_rel

policies.base calls it for a policy's chunks, learner.relative for a dataset's. Facts: Isaac-GR00T's EndEffectorPose and
LeRobot's `relative_eef_to_absolute` (`xyz+rot6d`; Zhou et al., 1812.07035, orthonormal by Gram-Schmidt).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH = 9  # numbers of a pose
FORMAT = "xyz+rot6d"  # the one that is read
NONE = 1e-12  # length below which a direction is none: such a row stays near 0, and everything finite


def rotation_of(rows: Tensor) -> Tensor:
    """float[..., 6], the first two rows of a rotation matrix or what a network takes for them, to float[..., 3, 3]."""
    first, second = rows[..., :3], rows[..., 3:]
    first = _unit(first)
    second = _unit(second - (first * second).sum(-1, keepdim=True) * first)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-2)


def relative_pose(pose: Tensor, reference: Tensor) -> Tensor:
    """Poses float[..., 9] as they are seen from `reference`, of a shape that broadcasts."""
    seen = rotation_of(reference[..., 3:])
    moved = (pose[..., None, :3] - reference[..., None, :3]) @ seen  # rows: (Rᵀ d)ᵀ = dᵀ R
    return _numbers(moved, seen.mT @ rotation_of(pose[..., 3:]))


def absolute_pose(pose: Tensor, reference: Tensor) -> Tensor:
    """The inverse of `relative_pose`: the rotation comes out orthonormal."""
    seen = rotation_of(reference[..., 3:])
    moved = pose[..., None, :3] @ seen.mT + reference[..., None, :3]
    return _numbers(moved, seen @ rotation_of(pose[..., 3:]))


def to_relative(chunk: Tensor, anchor: Tensor, poses: Sequence[int] = ()) -> Tensor:
    """Absolute actions float[..., dims] less their anchor, a shape that broadcasts, 0 where an action stays absolute.
    poses: first dims of those that are poses."""
    return _with_poses(chunk - anchor, chunk, anchor, poses, relative_pose)


def to_absolute(chunk: Tensor, anchor: Tensor, poses: Sequence[int] = ()) -> Tensor:
    """The inverse of `to_relative`."""
    return _with_poses(chunk + anchor, chunk, anchor, poses, absolute_pose)


def _with_poses(out: Tensor, chunk: Tensor, anchor: Tensor, poses: Sequence[int], change) -> Tensor:
    pieces, done = [], 0
    for first in poses:
        span = slice(first, first + WIDTH)
        pieces += [out[..., done:first], change(chunk[..., span], anchor[..., span])]
        done = span.stop
    return torch.cat([*pieces, out[..., done:]], dim=-1) if pieces else out


def _numbers(position: Tensor, rotation: Tensor) -> Tensor:
    return torch.cat([position, rotation[..., :2, :].flatten(-2)[..., None, :]], dim=-1).squeeze(-2)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=NONE)
