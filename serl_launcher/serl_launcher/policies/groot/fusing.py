"""Products that share their input become one, where a GR00T only serves.

groot.head calls `fuse` once, after the policy server has cast the parameters: weights lie side by side
(policies.fusing). Layers that LoRA wraps stay as they are.

    attention.qkv, mlp.gate_up      of a layer
    model.cross                     keys and values of all cross-attention layers of the diffusion transformer
    model.modulate                  what the flow time does to all its norms
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from serl_launcher.policies.fusing import check_views, plain, side_by_side
from serl_launcher.policies.groot.dit import cross_layers, modulated


@torch.no_grad()
def fuse(language_layers: Iterable[nn.Module], action_head: nn.Module) -> None:
    """Fuse the layers of a Qwen3 or Qwen3-VL, and the action head's transformers."""
    for layer in language_layers:
        attention, mlp = layer.self_attn, layer.mlp
        _put(attention, "qkv", [attention.q_proj, attention.k_proj, attention.v_proj])
        _put(mlp, "gate_up", [mlp.gate_proj, mlp.up_proj])
    dit, tokens = action_head.model, action_head.vl_self_attention
    crosses = cross_layers(dit)
    blocks = [*dit.transformer_blocks, *getattr(tokens, "transformer_blocks", ())]
    for attention in (block.attn1 for block in blocks):
        if attention not in crosses:
            _put(attention, "qkv", [attention.to_q, attention.to_k, attention.to_v])
    _put(dit, "cross", [layer for attention in crosses for layer in (attention.to_k, attention.to_v)])
    _put(dit, "modulate", modulated(dit))


def check_fused(action_head: nn.Module) -> None:
    """RuntimeError where a fused policy was moved, cast or copied."""
    fused = getattr(action_head.model, "modulate", None)
    check_views(None if fused is None else fused[0], modulated(action_head.model)[0].weight)


def _put(owner: Any, name: str, layers: Sequence[nn.Module]) -> None:
    """Give `owner` the weights (and biases, where there are) of these layers side by side, unless one is wrapped."""
    if not plain(layers):
        return
    weight = side_by_side([layer.weight for layer in layers])
    biased = layers[0].bias is not None
    setattr(owner, name, (weight, side_by_side([layer.bias for layer in layers])) if biased else (weight,))
