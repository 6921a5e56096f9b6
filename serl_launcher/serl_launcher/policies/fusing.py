"""Weights that share their input lie side by side, where a policy only serves: one product in place of several.

pi0.fusing and groot.fusing say which. The parameters become views of one buffer: names, values and the state dict stay,
and new values copied into the parameters are in the buffer.

    buffer   [ q_proj.weight | k_proj.weight | v_proj.weight ]   one product, split afterwards
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def plain(modules: Iterable[Any]) -> bool:
    """Are all of them linear layers that nothing wraps (LoRA does)?"""
    return all(type(module) is nn.Linear for module in modules)


def side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One buffer, joined along the first axis, of which the parameters are views from here on."""
    buffer = torch.cat([parameter.data for parameter in parameters])
    for parameter, view in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
        parameter.data = view
    return buffer


def check_views(buffer: Tensor | None, parameter: nn.Parameter) -> None:
    """RuntimeError where a fused policy was moved, cast or copied: its buffers would miss new parameters."""
    if buffer is not None and buffer.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
        raise RuntimeError("a policy that was made to serve (fuse_for_serving) was moved, cast or copied afterwards")
