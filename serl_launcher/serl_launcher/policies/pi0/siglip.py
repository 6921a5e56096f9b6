"""The vision tower of PI0 and PI0.5, layer by layer: each compiled and checkpointed as the language layers are.

pi0.head calls `run_tower` with `attention: sdpa`; with `eager` it calls the library's tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.compiling import run_layer


def run_tower(
    tower: Any, pixels: Tensor, dtype: torch.dtype | None, layer_function: Callable, checkpointing: bool
) -> Tensor:
    """Pictures float32[b, 3, side, side] in [−1, 1] to tokens float[b, patches, width].

    tower: a `SiglipVisionTransformer`; dtype: that its layers run in, None as autocast says; layer_function:
    `vision_layer`, or what torch.compile made of it.
    """
    x = tower.embeddings(pixels)
    x = x if dtype is None else x.to(dtype)
    for layer in tower.encoder.layers:
        x = run_layer(checkpointing, layer_function, layer, x)
    return layer_norm(tower.post_layernorm, x)


def vision_layer(layer: Any, x: Tensor) -> Tensor:
    """One `SiglipEncoderLayer`: float[b, l, width]."""
    attention = layer.self_attn
    out = F.scaled_dot_product_attention(*project(attention, layer_norm(layer.layer_norm1, x)), scale=attention.scale)
    x = x + attention.out_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer_norm(layer.layer_norm2, x))


def project(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values float[b, heads, l, d]; one product where pi0.fusing has laid weights side by side."""
    fused = getattr(attention, "qkv", None)
    if fused is None:
        parts = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    else:
        parts = F.linear(x, *fused).chunk(3, dim=-1)
    return tuple(part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """In fp32, in the dtype of x again."""
    return F.layer_norm(x.float(), module.normalized_shape, module.weight, module.bias, module.eps).to(x.dtype)
