"""The layers of Eagle 3 in one call: pictures and prompt tokens in, features of every token out.

groot_n1_6.head calls `run_eagle3`. Pictures of one size go through the vision tower as one batch. No shape depends on
values and nothing waits for the device, so that it runs in a CUDA graph and on the meta device; each layer is
checkpointed once. Facts: Isaac-GR00T n1.6, Eagle-Block2A-2B-v2; its vision tower sorts patches into windows, which
without window attention and rotary embedding (as released) changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.compiling import run_layer
from serl_launcher.policies.groot_n1_5.eagle import run_qwen3


def run_eagle3(
    model: nn.Module,
    ids: Tensor,
    valid: Tensor,
    views: Sequence[Tensor],
    image_token: int,
    dtype: torch.dtype,
    checkpointing: bool,
    vision_function: Callable,
    text_function: Callable,
) -> Tensor:
    """Output of the last language layer that is kept, behind the final norm: float[b, l, width].

    model: `groot_n1_6.core.EagleModel`; ids: int64[b, l]; valid: bool[b, l], False for padding; views: of each camera,
    in the prompt's order, float32[b, 3, h, w] in [−1, 1], sides multiples of 28; dtype: what attention computes in;
    vision_function, text_function: `groot_n1_5.eagle.siglip_layer` and `groot.qwen.text_layer`, or what torch.compile
    made of them.
    """
    language = model.language_model.model
    seen: dict[int, Tensor] = {}
    for size in dict.fromkeys(view.shape for view in views):
        same = [k for k, view in enumerate(views) if view.shape == size]
        tokens = see(model, torch.cat([views[k] for k in same]), checkpointing, vision_function)
        seen |= zip(same, tokens.chunk(len(same)), strict=True)
    images = torch.cat([seen[k] for k in range(len(views))], dim=1).flatten(0, 1)
    return run_qwen3(language, ids, valid, images, ids == image_token, dtype, checkpointing, text_function)


def see(model: nn.Module, pixels: Tensor, checkpointing: bool, layer_function: Callable) -> Tensor:
    """Tokens of pictures of one size: float32[n, 3, h, w] to float[n, h/28 · w/28, width of the language model]."""
    vision = model.vision_model.vision_model
    patch = vision.embeddings.patch_size
    rows, columns = (side // patch for side in pixels.shape[-2:])
    x = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # n, 3, rows, patch, columns, patch
    x = vision.embeddings.patch_embedding(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
    # The embeddings stay fp32; what follows them is held as the connector is.
    x = x + positions(vision.embeddings.position_embedding.weight, rows, columns)
    x = x.to(vision.post_layernorm.weight.dtype)
    for layer in vision.encoder.layers:
        x = run_layer(checkpointing, layer_function, layer, x)
    x = vision.post_layernorm(x).transpose(1, 2).unflatten(2, (rows, columns))
    return model.mlp1(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))


def positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """A square table of position embeddings float[side², width] at another number of patches: float[rows · columns,
    width], bilinear, antialiased."""
    side = int(len(table) ** 0.5)
    square = table.T.unflatten(1, (side, side))[None].float()
    shape = {"mode": "bilinear", "align_corners": False, "antialias": True}
    return F.interpolate(square, (rows, columns), **shape)[0].flatten(1).T.to(table.dtype)
