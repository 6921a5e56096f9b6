"""Gemma layers as PI0 and PI0.5 need them: a prefix that returns its keys and values, a suffix that reads them.

Both heads (pi0.head, pi0.pi05) call `run_layers` with `attention: sdpa`. Against the library's call it uses the
fused attention, clones no cache at every flow step, and checkpoints each layer once (the library nests two checkpoints,
so that every layer runs three times).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.compiling import run_layer

KeysValues = tuple[Tensor, Tensor]  # float[b, kv heads, l, head_dim] each


def run_layers(
    model: nn.Module,
    x: Tensor,
    positions: Tensor,
    mask: Tensor,
    past: list[KeysValues] | None,
    condition: Tensor | None,
    checkpointing: bool,
    layer_function: Callable,
) -> tuple[Tensor, list[KeysValues]]:
    """Through every layer and the last norm of a `PiGemmaModel`.

    x: float[b, l, width]; positions: int64[b, l]; mask: bool[b, 1, l or 1, past + l], True where attended (every row
    must attend somewhere); past: keys and values of what came before, per layer; condition: float[b, width] of adaRMS.
    layer_function: `gemma_layer`, or what torch.compile made of it. Returns the hidden states and this call's own keys
    and values.
    """
    rope = model.rotary_emb(x, positions)
    own: list[KeysValues] = []
    for index, layer in enumerate(model.layers):
        arguments = (layer, x, rope, mask, None if past is None else past[index], condition)
        x, keys_values = run_layer(checkpointing, layer_function, *arguments)
        own.append(keys_values)
    return model.norm(x, condition)[0], own


def gemma_layer(
    layer: Any, x: Tensor, rope: KeysValues, mask: Tensor, past: KeysValues | None, condition: Tensor | None
) -> tuple[Tensor, KeysValues]:
    """One layer: the new hidden states, and its own keys and values."""
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    attention = layer.self_attn
    hidden, gate = layer.input_layernorm(x, condition)
    heads = (*hidden.shape[:-1], -1, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (project(hidden).view(heads).transpose(1, 2) for project in projections)
    q, k = apply_rotary_pos_emb(q, k, *rope)
    keys, values = (
        (k, v)
        if past is None
        else (torch.cat([old.to(k.dtype), new], 2) for old, new in zip(past, (k, v), strict=True))
    )
    out = _attend(q, keys, values, mask, attention.scaling).transpose(1, 2).flatten(2)
    x = _residual(x, attention.o_proj(out), gate)
    hidden, gate = layer.post_attention_layernorm(x, condition)
    return _residual(x, layer.mlp(hidden), gate), (k, v)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Fused attention; the one key-value head of Gemma is broadcast without a copy."""
    if keys.shape[1] != q.shape[1]:
        keys, values = (x.expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def _residual(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    return (x + update if gate is None else x + update * gate).to(x.dtype)
