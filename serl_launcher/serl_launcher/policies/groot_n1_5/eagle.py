"""The layers of Eagle 2.5 in one call: pictures and prompt tokens in, features of every token out.

groot_n1_5.head calls `run_eagle`. No shape depends on values and nothing waits for the device, so that it runs in a
CUDA graph and on the meta device; each layer is checkpointed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from serl_launcher.policies.attention import attention_bias
from serl_launcher.policies.compiling import run_layer
from serl_launcher.policies.groot.qwen import causal_mask, image_places, place_images, rotary


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
    return run_qwen3(language, ids, valid, seen, ids == image_token, dtype, checkpointing, text_function)


def run_qwen3(
    language: nn.Module,
    ids: Tensor,
    valid: Tensor,
    images: Tensor,
    is_image: Tensor,
    dtype: torch.dtype,
    checkpointing: bool,
    text_function: Callable,
) -> Tensor:
    """`Qwen3Model` over ids int64[b, l], images float[b·tokens of a sample, width] in place of the tokens is_image
    bool[b, l], behind the final norm: float[b, l, width]."""
    x = place_images(language.embed_tokens(ids), images, image_places(is_image, len(images) // len(ids)))
    tables = rotary(language, torch.arange(ids.shape[1], device=ids.device)[None])
    bias = attention_bias(causal_mask(valid), dtype)
    for layer in language.layers:
        x = run_layer(checkpointing, text_function, layer, x, bias, *tables)
    return language.norm(x)
