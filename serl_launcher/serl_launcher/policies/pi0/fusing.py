"""Products that share their input become one, where a policy only serves.

pi0.head calls `fuse` once, after the policy server has cast the parameters: weights of q, k and v, and of gate and up,
lie side by side in one buffer of which the parameters are views. Names, values and the state dict stay; new values
copied into the parameters are in the buffer. Layers that LoRA wraps stay as they are.

    buffer   [ q_proj.weight | k_proj.weight | v_proj.weight ]   one product, split afterwards
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def fuse(gemmas: Iterable[nn.Module], tower: nn.Module) -> None:
    """Fuse every layer of these `PiGemmaModel`s and of a `SiglipVisionTransformer`."""
    for layer in (layer for model in gemmas for layer in model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        joined = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        if plain((*joined[0], *joined[1], attention.o_proj, mlp.down_proj)):
            attention.qkv, mlp.gate_up = (side_by_side([part.weight for part in parts]) for parts in joined)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        if plain(parts := (attention.q_proj, attention.k_proj, attention.v_proj)):
            attention.qkv = tuple(side_by_side([getattr(part, name) for part in parts]) for name in ("weight", "bias"))


def plain(modules: Iterable[Any]) -> bool:
    """Are all of them linear layers that nothing wraps?"""
    return all(type(module) is nn.Linear for module in modules)


def side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    """One buffer, joined along the first axis, of which the parameters are views from here on."""
    buffer = torch.cat([parameter.data for parameter in parameters])
    for parameter, view in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
        parameter.data = view
    return buffer


def check_fused(model: nn.Module) -> None:
    """RuntimeError where a fused `PiGemmaModel` was moved, cast or copied: its buffers would miss new parameters."""
    attention = model.layers[0].self_attn
    fused = getattr(attention, "qkv", None)
    if fused is not None and fused.untyped_storage()._cdata != attention.q_proj.weight.untyped_storage()._cdata:
        raise RuntimeError("a policy that was made to serve (fuse_for_serving) was moved, cast or copied afterwards")
