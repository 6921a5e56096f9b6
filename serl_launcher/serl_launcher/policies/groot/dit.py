"""The layers of GR00T's action head in one call: the vision-language attention, and the diffusion transformer.

The head (groot.head) calls them with `attention: sdpa`. Against the library's call: keys and values of the
cross-attention are computed once an observation instead of once a flow step (`cross_keys`) and serve all samples of it,
what the flow time does to the norms is computed for all layers and steps beforehand (`modulations`), padding is masked
where the library lets tokens attend to it (`mask_padding`), and each layer is checkpointed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.compiling import run_layer

KeysValues = tuple[Tensor, Tensor]  # float[b, heads, l, head_dim] each
Modulation = tuple[Tensor, Tensor]
"""Scale and shift behind a norm: float[width] where all rows are at one flow time, else float[b, 1, width]."""


class Layers(NamedTuple):
    """The three functions below, or what torch.compile made of them."""

    tokens: Callable
    cross: Callable
    own: Callable


def attend_tokens(model: nn.Module, x: Tensor, bias: Tensor | None, checkpointing: bool, function: Callable) -> Tensor:
    """`SelfAttentionTransformer` over float[b, l, width]; bias: float[b, 1, 1, l], added to attention's scores, None:
    all tokens are attended to; function: `token_block`."""
    for block in getattr(model, "transformer_blocks", ()):  # none: nn.Identity, by a configuration without such layers
        x = run_layer(checkpointing, function, block, x, bias)
    return x


def cross_keys(model: nn.Module, hidden: Tensor) -> tuple[KeysValues, ...]:
    """Keys and values of every cross-attention layer, in order. hidden: float[b, l, width of the backbone]."""
    layers, fused = cross_layers(model), getattr(model, "cross", None)
    if fused is None:
        parts = [project(hidden) for layer in layers for project in (layer.to_k, layer.to_v)]
    else:
        parts = F.linear(hidden, *fused).chunk(2 * len(layers), dim=-1)
    return tuple(
        (_heads(layer, keys), _heads(layer, values))
        for layer, keys, values in zip(layers, parts[::2], parts[1::2], strict=True)
    )


def cross_layers(model: nn.Module) -> list[Any]:
    """The cross-attention of the diffusion transformer, layer by layer."""
    return [block.attn1 for block in list(model.transformer_blocks)[:: _stride(model)]]


def modulations(model: nn.Module, bucket: Tensor) -> list[Modulation]:
    """Scale and shift of every layer's norm and of the last one, float[m, width] each, at the flow times of bucket
    int64[m], in thousandths."""
    active, fused = F.silu(model.timestep_encoder(bucket)), getattr(model, "modulate", None)
    both = torch.cat([layer(active) for layer in modulated(model)], -1) if fused is None else F.linear(active, *fused)
    halves = 2 * (len(model.transformer_blocks) + 1)
    scaled, shifts = (1 + both).chunk(halves, dim=-1), both.chunk(halves, dim=-1)
    inner = [(scaled[k], shifts[k + 1]) for k in range(0, halves - 2, 2)]
    return [*inner, (scaled[-1], shifts[-2])]  # the last layer's has the shift first


def modulated(model: nn.Module) -> list[nn.Module]:
    """The linear layers that make `modulations`, in their order."""
    return [*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1]


def run_dit(
    model: nn.Module,
    x: Tensor,
    norms: Sequence[Modulation],
    keys_values: Sequence[KeysValues],
    biases: tuple[Tensor | None, Tensor | None],
    checkpointing: bool,
    layers: Layers,
) -> Tensor:
    """The diffusion transformer: float[b·n, t, width] -> float[b·n, t, output width].

    norms: as `modulations` orders them; keys_values: of b rows; biases: of text and of image tokens, float[b, 1, 1, l]
    each, which cross-attention layers read in turn (`AlternateVLDiT`), None: all tokens.
    """
    stride, every = _stride(model), 2 * getattr(model, "attend_text_every_n_blocks", 1)
    for index, block in enumerate(model.transformer_blocks):
        if index % stride:
            x = run_layer(checkpointing, layers.own, block, x, *norms[index])
            continue
        bias = biases[0 if index % every == 0 else 1]
        x = run_layer(checkpointing, layers.cross, block, x, *norms[index], *keys_values[index // stride], bias)
    return model.proj_out_2(_modulated_norm(model.norm_out, x, *norms[-1]))


def token_block(block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """A layer of the vision-language attention."""
    return _behind(block, x, _attend_own(block.attn1, block.norm1(x), bias))


def own_block(block: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A layer of the diffusion transformer whose tokens attend to each other."""
    return _behind(block, x, _attend_own(block.attn1, _modulated_norm(block.norm1.norm, x, scale, shift), None))


def cross_block(
    block: Any, x: Tensor, scale: Tensor, shift: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """A layer that attends to the backbone's tokens. x: float[b·n, t, width]; keys and values have b rows: the queries
    of a row's n samples stand one behind the other, since none of them sees another."""
    attention = block.attn1
    q = attention.to_q(_modulated_norm(block.norm1.norm, x, scale, shift))
    q = _heads(attention, q.reshape(len(keys), -1, q.shape[-1]))
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
    return _behind(block, x, out.transpose(1, 2).reshape(len(x), -1, q.shape[1] * q.shape[3]))


def _attend_own(attention: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Self-attention over float[b, l, width]; one product where groot.fusing has laid the weights side by side."""
    fused = getattr(attention, "qkv", None)
    if fused is None:
        parts = (attention.to_q(x), attention.to_k(x), attention.to_v(x))
    else:
        parts = F.linear(x, *fused).chunk(3, dim=-1)
    q, k, v = (_heads(attention, part) for part in parts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def _behind(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What follows a layer's attention: its projection and the feed-forward part, each added to x."""
    project, drop = block.attn1.to_out
    out = drop(project(attended))
    x = x + (block.final_dropout(out) if block.final_dropout else out)
    return x + block.ff(block.norm3(x))


def _modulated_norm(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if scale.ndim == 1:
        return F.layer_norm(x, x.shape[-1:], scale, shift, norm.eps)
    return norm(x) * scale + shift


def _stride(model: nn.Module) -> int:
    """Distance of two cross-attention layers."""
    return 2 if model.config.interleave_self_attention else 1


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
