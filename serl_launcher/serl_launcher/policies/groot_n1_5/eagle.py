"""The layers of Eagle 2.5 in one call: pictures and prompt tokens in, features of every token out.

groot_n1_5.head calls `run_eagle`. No shape depends on values and nothing waits for the device, so that it runs in a
CUDA graph and on the meta device; each layer is checkpointed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from serl_launcher.policies.compiling import run_layer
from serl_launcher.policies.groot.qwen import attention_bias, causal_mask, image_places, place_images, rotary


def siglip_layer(layer: Any, x: Tensor) -> Tensor:
    """One layer of the vision tower over float[n images, l, width]; an image attends to itself alone."""
    out = layer(x, attention_mask=None)
    return out if isinstance(out, Tensor) else out[0]


def run_eagle(
    model: nn.Module,
    ids: Tensor,
    valid: Tensor,
    pixels: Tensor,
    image_token: int,
    dtype: torch.dtype,
    checkpointing: bool,
    vision_function: Callable,
    text_function: Callable,
) -> Tensor:
    """Output of the last language layer that is kept, behind the final norm: float[b, l, width].

    model: `EagleModel`; ids: int64[b, l]; valid: bool[b, l], False for padding; pixels: float32[b·images, 3, h, w] in
    [−1, 1], images of one sample adjacent and as many in each; dtype: what attention computes in; vision_function,
    text_function: `siglip_layer` and `groot.qwen.text_layer`, or what torch.compile made of them.
    """
    vision, language = model.vision_model.vision_model, model.language_model.model
    # The embeddings stay fp32; what follows them is held as the connector is.
    seen = vision.embeddings(pixels).to(vision.post_layernorm.weight.dtype)
    for layer in vision.encoder.layers:
        seen = run_layer(checkpointing, vision_function, layer, seen)
    seen = model.mlp1(vision.post_layernorm(seen)).flatten(0, 1)
    places = image_places(ids == image_token, len(seen) // len(ids))
    return run_qwen3(
        language, place_images(language.embed_tokens(ids), seen, places), valid, dtype, checkpointing, text_function
    )


def run_qwen3(
    language: nn.Module, x: Tensor, valid: Tensor, dtype: torch.dtype, checkpointing: bool, text_function: Callable
) -> Tensor:
    """`Qwen3Model` over tokens float[b, l, width] in place of ids, behind the final norm; dtype: what attention
    computes in."""
    tables = rotary(language, torch.arange(x.shape[1], device=x.device)[None])
    bias = attention_bias(causal_mask(valid), dtype)
    for layer in language.layers:
        x = run_layer(checkpointing, text_function, layer, x, bias, *tables)
    return language.norm(x)
