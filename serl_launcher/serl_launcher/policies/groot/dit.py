"""The layers of GR00T's action head in one call: the vision-language attention, and the diffusion transformer.

The head (groot.head) calls them with `attention: sdpa`. Against the library's call: keys and values of the
cross-attention are computed once an observation instead of once a flow step (`cross_keys`), padding is masked where the
library lets tokens attend to it (`mask_padding`), and each layer is checkpointed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.compiling import run_layer

KeysValues = tuple[Tensor, Tensor]  # float[b, heads, l, head_dim] each


def attend_tokens(model: nn.Module, x: Tensor, keep: Tensor | None, checkpointing: bool) -> Tensor:
    """`SelfAttentionTransformer` over float[b, l, width]; keep: bool[b, l], False for padding, None: all."""
    blocks = getattr(model, "transformer_blocks", None)
    if blocks is None:  # nn.Identity, where the configuration has no such layers
        return x
    for block in blocks:
        x = run_layer(checkpointing, partial(block, attention_mask=keep), x)
    return x


def cross_keys(model: nn.Module, hidden: Tensor) -> tuple[KeysValues, ...]:
    """Keys and values of every cross-attention layer, in order. hidden: float[b, l, width of the backbone]."""
    return tuple(
        (_heads(block.attn1, block.attn1.to_k(hidden)), _heads(block.attn1, block.attn1.to_v(hidden)))
        for block in list(model.transformer_blocks)[:: _stride(model)]
    )


def run_dit(
    model: nn.Module,
    x: Tensor,
    bucket: Tensor,
    keys_values: Sequence[KeysValues],
    masks: tuple[Tensor, Tensor] | None,
    checkpointing: bool,
    block_function: Callable,
) -> Tensor:
    """The diffusion transformer: float[b, t, width] -> float[b, t, output width].

    bucket: int64[b], the flow time in thousandths; masks: of text and of image tokens, bool[b, 1, 1, l] each, which
    cross-attention layers read in turn (`AlternateVLDiT`), None: all tokens; block_function: `dit_block`, or what
    torch.compile made of it.
    """
    condition = model.timestep_encoder(bucket)
    stride, every = _stride(model), 2 * getattr(model, "attend_text_every_n_blocks", 1)
    for index, block in enumerate(model.transformer_blocks):
        if index % stride:
            x = run_layer(checkpointing, block_function, block, x, condition, None, None, None)
            continue
        mask = None if masks is None else masks[0 if index % every == 0 else 1]
        x = run_layer(checkpointing, block_function, block, x, condition, *keys_values[index // stride], mask)
    shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
    return model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])


def dit_block(
    block: Any, x: Tensor, condition: Tensor, keys: Tensor | None, values: Tensor | None, mask: Tensor | None
) -> Tensor:
    """One layer; without keys it attends to its own tokens."""
    attention = block.attn1
    normed = block.norm1(x, condition) if block.norm_type == "ada_norm" else block.norm1(x)
    q = _heads(attention, attention.to_q(normed))
    if keys is None:
        keys, values = _heads(attention, attention.to_k(normed)), _heads(attention, attention.to_v(normed))
    out = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask)
    out = attention.to_out[1](attention.to_out[0](out.transpose(1, 2).flatten(2)))
    x = x + (block.final_dropout(out) if block.final_dropout else out)
    return x + block.ff(block.norm3(x))


def _stride(model: nn.Module) -> int:
    """Distance of two cross-attention layers."""
    return 2 if model.config.interleave_self_attention else 1


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
