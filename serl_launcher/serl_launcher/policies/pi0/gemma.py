"""Gemma layers as PI0 and PI0.5 need them: a prefix that leaves its keys and values, a suffix that reads them.

pi0.head calls `run_layers` with `attention: sdpa`, for the prefix and for every flow step. What several layers or steps
share comes from outside: rotary tables, the mask, each norm's modulation. Two ways to attend to what came before:

    start=None   the past is read, own keys and values are joined to it: any number of passes, with gradient
    start=k      own keys and values are written into the past's spare room from token k on, in place: no copy of it

The one key-value head of Gemma is never repeated: the query heads become rows of one head, [b, 1, l · heads, d].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.attention import attention_bias
from serl_launcher.policies.compiling import run_layer

KeysValues = tuple[Tensor, Tensor]  # float[b, kv heads, l, head_dim] each
Rotary = tuple[Tensor, Tensor]  # cosines and signed sines, float32[b, l, 1, head_dim] each
Modulation = tuple[Tensor, Tensor | None, Tensor | None]
"""Scale, shift and gate behind a norm, float[…, width], over all rows or float[b, n, 1, width] over n groups of them;
shift and gate are None where nothing conditions the norm."""


def run_layers(
    model: nn.Module,
    x: Tensor,
    rope: Rotary,
    bias: Tensor | None,
    norms: Sequence[Modulation],
    past: Sequence[KeysValues] | None,
    layer_function: Callable,
    *,
    start: int | None = None,
    hidden: bool = True,
    checkpointing: bool = False,
) -> tuple[Tensor | None, list[KeysValues]]:
    """Through every layer and the last norm of a `PiGemmaModel`.

    x: float[b, l, width]; rope: `rotary`; bias: `bias_of_rows`, None where all attend to all; norms: `modulations`;
    past: keys and values of what came before, per layer; layer_function: `gemma_layer`, or what torch.compile made of
    it; hidden: whether hidden states are asked for: without, the last layer ends at its keys and values. Returns the
    hidden states, or None, and keys and values: this call's own, or all that `past` holds now where `start` is given.
    """
    kept: list[KeysValues] = []
    last = len(model.layers) - 1
    for index, layer in enumerate(model.layers):
        own = norms[2 * index : 2 * index + 2]
        before = None if past is None else past[index]
        arguments = (layer, x, rope, bias, own, before, start, hidden or index < last)
        x, keys_values = run_layer(checkpointing, layer_function, *arguments)
        kept.append(keys_values)
    return (norm(model.norm, x, norms[-1]) if hidden else None), kept


def gemma_layer(
    layer: Any,
    x: Tensor,
    rope: Rotary,
    bias: Tensor | None,
    norms: Sequence[Modulation],
    past: KeysValues | None,
    start: int | None,
    hidden: bool,
) -> tuple[Tensor, KeysValues]:
    """One layer: the new hidden states (the old where none are asked for), and keys and values as `run_layers` says."""
    attention = layer.self_attn
    normed = norm(layer.input_layernorm, x, norms[0])
    q, k, v = project(attention, normed, rope)
    keys, values, kept = remember(k, v, past, start)
    if not hidden:
        return x, kept
    (b, length), (kv, d) = x.shape[:2], keys.shape[1::2]
    rows = q.view(b, length, kv, -1, d).transpose(1, 2).reshape(b, kv, -1, d)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=attention.scaling)
    out = out.reshape(b, kv, length, -1).transpose(1, 2).reshape(b, length, -1)
    fused = getattr(attention, "qkv", None) is not None
    x = residual(x, attention.o_proj, out, norms[0][2], fused)
    out = feed_forward(layer.mlp, norm(layer.post_attention_layernorm, x, norms[1]))
    return residual(x, layer.mlp.down_proj, out, norms[1][2], fused), kept


def project(attention: Any, x: Tensor, rope: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Queries float[b, l, heads, d], keys and values float[b, l, kv heads, d]; one product where pi0.fusing has laid
    the weights side by side. Queries and keys turn together, in fp32, in which the keys still are."""
    fused, shape = getattr(attention, "qkv", None), (*x.shape[:2], -1, attention.head_dim)
    if fused is None:
        qk = torch.cat([attention.q_proj(x), attention.k_proj(x)], dim=-1).view(shape)
        v = attention.v_proj(x).view(shape)
    else:
        qkv, kv = F.linear(x, fused).view(shape), attention.config.num_key_value_heads
        qk, v = qkv[:, :, :-kv], qkv[:, :, -kv:]
    qk, kv = rotate(qk, rope), v.shape[2]
    return qk[:, :, :-kv].to(v.dtype), qk[:, :, -kv:], v


def remember(k: Tensor, v: Tensor, past: KeysValues | None, start: int | None) -> tuple[Tensor, Tensor, KeysValues]:
    """Keys and values to attend to, and those to keep."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if start is None:
        k = k.to(v.dtype)
        if past is None:
            return k, v, (k, v)
        return torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2), (k, v)
    end = start + k.shape[2]
    past[0][:, :, start:end].copy_(k)
    past[1][:, :, start:end].copy_(v)
    return past[0][:, :, :end], past[1][:, :, :end], past


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """Gemma's gated MLP up to its last layer; gate and up are one product where pi0.fusing has laid the weights side by
    side."""
    fused = getattr(mlp, "gate_up", None)
    gate, up = (mlp.gate_proj(x), mlp.up_proj(x)) if fused is None else F.linear(x, fused).chunk(2, dim=-1)
    return mlp.act_fn(gate) * up


def norm(module: Any, x: Tensor, modulation: Modulation) -> Tensor:
    """`PiGemmaRMSNorm` in fp32, in the dtype of x again."""
    scale, shift, _ = modulation
    if shift is None:
        return rms_norm(x.float(), scale, module.eps).to(x.dtype)
    normed = rms_norm(x.float(), None, module.eps)
    return _grouped(lambda rows: torch.addcmul(shift, rows, scale), normed, scale).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """x / √(mean x² + eps), times `scale`: float32[b, l, width]."""
    if x.is_cuda:  # one kernel there, seven passes on a CPU
        return F.rms_norm(x, x.shape[-1:], scale, eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x = x * torch.add(eps, length.square(), alpha=1 / x.shape[-1]).rsqrt()
    return x if scale is None else x * scale


def residual(x: Tensor, layer: Any, update: Tensor, gate: Tensor | None, fused: bool) -> Tensor:
    """x + gate · layer(update), in the dtype of x. fused: the linear layer adds by itself."""
    if fused and gate is None:
        return torch.addmm(x.flatten(0, 1), update.flatten(0, 1), layer.weight.t()).view_as(x)
    update = layer(update)
    return (x + update if gate is None else x + _grouped(lambda rows: rows * gate, update, gate)).to(x.dtype)


def _grouped(function: Callable[[Tensor], Tensor], x: Tensor, over: Tensor) -> Tensor:
    """`function` of x float[b, l, width] where its rows are seen as `over`'s groups."""
    return function(x) if over.ndim < 4 else function(x.unflatten(1, (over.shape[1], -1))).flatten(1, 2)


def modulations(model: nn.Module, condition: Tensor | None = None) -> list[Modulation]:
    """Of every norm, in the order that they are passed: 1 + weight, or adaRMS' of condition float[…, width]."""
    layers = [n for layer in model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    return [_modulation(module, condition) for module in (*layers, model.norm)]


def _modulation(module: Any, condition: Tensor | None) -> Modulation:
    if condition is None:
        return 1 + module.weight.float(), None, None
    scale, shift, gate = module.dense(condition).chunk(3, dim=-1)
    return 1 + scale.float(), shift.float(), gate


def rotary(model: nn.Module, positions: Tensor) -> Rotary:
    """Tables for tokens at positions int64[b, l]; the first half of the sines is negative, as `rotate` wants them."""
    cos, sin = model.rotary_emb(positions.float(), positions)
    first, second = sin.chunk(2, dim=-1)
    return cos[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]


def rotate(x: Tensor, rope: Rotary) -> Tensor:
    """Rotary embedding of float[b, l, heads, d], in fp32: x · cos + (−x₂, x₁) · sin."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * rope[0], torch.cat([second, first], dim=-1), rope[1])


def bias_of_rows(keep: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """What is added to attention's scores: float[b, 1, 1 or rows · heads, l], −∞ where keep bool[b, rows, l] is False.

    rows is 1 where all attend to the same; otherwise each becomes `heads` rows, one after the other.
    """
    keep = keep.repeat_interleave(heads, 1) if keep.shape[1] > 1 else keep
    return attention_bias(keep, dtype)[:, None]
