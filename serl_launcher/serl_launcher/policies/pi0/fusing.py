"""Products that share their input become one, where a policy only serves.

pi0.head calls `fuse` once, after the policy server has cast the parameters: weights of q, k and v, and of gate and up,
lie side by side (policies.fusing). Layers that LoRA wraps stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from serl_launcher.policies.fusing import check_views, plain, side_by_side


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


def check_fused(model: nn.Module) -> None:
    """RuntimeError where a fused `PiGemmaModel` was moved, cast or copied."""
    attention = model.layers[0].self_attn
    check_views(getattr(attention, "qkv", None), attention.q_proj.weight)
