"""The layers of GR00T's backbone (Qwen3-VL) in one call: images and prompt tokens in, features of every token out.

groot.head calls `run_backbone` with `attention: sdpa`. Against the library's call: images of one size go
through the vision tower as one batch, nothing waits for the device (grids are known on the host, no shape depends on
values), so that it runs in a CUDA graph and on the meta device, and each layer is checkpointed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.compiling import run_layer


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches of one image, before 2 × 2 of them are merged into a token."""

    rows: int
    columns: int
    merge: int  # patches along a token's side


def vision_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One layer of the vision tower over float[n images, l, width]; an image attends to itself alone."""
    attention, shape = block.attn, (*x.shape[:2], 3, block.attn.num_heads, -1)
    q, k, v = attention.qkv(block.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
    x = x + attention.proj(out.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def text_layer(layer: Any, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One layer of the language model; mask: bool[b, 1, l, l], True where attended."""
    out = layer(x, position_embeddings=(cos, sin), attention_mask=mask)
    return out if isinstance(out, Tensor) else out[0]


def run_backbone(
    model: nn.Module,
    ids: Tensor,
    valid: Tensor,
    pixels: Tensor,
    grid: Grid,
    checkpointing: bool,
    vision_function: Callable,
    text_function: Callable,
) -> Tensor:
    """Output of the last language layer, before the final norm: float[b, l, width].

    model: `Qwen3VLModel`; ids: int64[b, l]; valid: bool[b, l], False for padding; pixels: float32[b·images·patches,
    3·2·16²] as Qwen's processor flattens them; every sample has the same number of images. vision_function,
    text_function: the two functions above, or what torch.compile made of them.
    """
    seen, deep = _see(model.visual, pixels, grid, checkpointing, vision_function)
    is_image = ids == model.config.image_token_id
    language = model.language_model
    x = place_images(language.embed_tokens(ids), seen, is_image)
    cos, sin = language.rotary_emb(x, rope_positions(is_image, valid, grid))
    mask = causal_mask(valid)
    for index, layer in enumerate(language.layers):
        x = run_layer(checkpointing, text_function, layer, x, mask, cos, sin)
        # What is added behind the last layer, the action head does not see: it reads that layer's output.
        if index < len(deep) and index + 1 < len(language.layers):
            x = x + place_images(torch.zeros_like(x), deep[index], is_image)
    return x


def _see(
    visual: Any, pixels: Tensor, grid: Grid, checkpointing: bool, block_function: Callable
) -> tuple[Tensor, list[Tensor]]:
    """Tokens of all images float[n·tokens, width of the language model], and the features of inner layers."""
    # A convolution whose stride is its size is a matrix product.
    embed = visual.patch_embed.proj
    x = F.linear(pixels, embed.weight.flatten(1), embed.bias)
    index, weight = patch_positions(grid, visual.num_grid_per_side, x.device)
    position = (visual.pos_embed(index) * weight[..., None].to(visual.pos_embed.weight.dtype)).sum(0)
    x = x.view(-1, grid.rows * grid.columns, x.shape[-1]) + position
    angles = patch_places(grid, x.device)[..., None] * visual.rotary_pos_emb.inv_freq.float()
    angles = angles.flatten(1).repeat(1, 2)
    cos, sin, deep = angles.cos(), angles.sin(), []
    taps = list(visual.deepstack_visual_indexes)
    for k, block in enumerate(visual.blocks):
        x = run_layer(checkpointing, block_function, block, x, cos, sin)
        if k in taps:
            deep.append(visual.deepstack_merger_list[taps.index(k)](x.flatten(0, 1)))
    return visual.merger(x.flatten(0, 1)), deep


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in fp32. x: float[n, heads, l, head_dim]; cos, sin: float32[l, head_dim]."""
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def place_images(x: Tensor, images: Tensor, is_image: Tensor) -> Tensor:
    """x with its image tokens replaced, in order. images: float[b·tokens of a sample, width]."""
    images = images.view(len(x), -1, x.shape[-1])
    index = (is_image.cumsum(1) - 1).clamp(0, images.shape[1] - 1)
    spread = images.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    return torch.where(is_image[..., None], spread.to(x.dtype), x)


def rope_positions(is_image: Tensor, valid: Tensor, grid: Grid) -> Tensor:
    """Places of the tokens in time, height and width: int64[3, b, l]; padding has 0.

    Text counts on; the tokens of an image share a time and count rows and columns from there; what follows an image
    begins behind its longer side.
    """
    rows, columns = grid.rows // grid.merge, grid.columns // grid.merge
    text = valid & ~is_image
    words, tokens = text.cumsum(1) - text.long(), is_image.cumsum(1) - is_image.long()
    start = words + tokens // (rows * columns) * max(rows, columns)
    within = torch.where(is_image, tokens % (rows * columns), 0)
    places = torch.stack([start, start + within // columns, start + within % columns])
    return torch.where(valid, places, 0)


def causal_mask(valid: Tensor) -> Tensor:
    """bool[b, 1, l, l]: a token sees itself and what is before it, but no padding; padding in front sees itself."""
    side = valid.shape[1]
    earlier = torch.ones(side, side, dtype=torch.bool, device=valid.device).tril()
    mask = earlier & valid[:, None, :]
    empty = valid.cumsum(1) == 0
    alone = torch.eye(side, dtype=torch.bool, device=valid.device) & empty[:, :, None]
    return (mask | alone)[:, None]


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept for training too
def patch_places(grid: Grid, device: torch.device) -> Tensor:
    """Row and column of every patch, the four of a token adjacent: float32[l, 2]."""
    with torch.device("cpu"):
        row, column = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij")
        return _by_token(torch.stack([row, column], -1).float(), grid).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def patch_positions(grid: Grid, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation of a side × side table of position embeddings: index int64[4, l], weight float32[4, l]."""
    across = [torch.linspace(0, side - 1, n, device="cpu") for n in (grid.rows, grid.columns)]
    low = [x.long() for x in across]
    high = [(x + 1).clamp(max=side - 1) for x in low]
    share = [x - floor for x, floor in zip(across, low, strict=True)]
    index, weight = [], []
    for row, part_r in ((low[0], 1 - share[0]), (high[0], share[0])):
        for column, part_c in ((low[1], 1 - share[1]), (high[1], share[1])):
            index.append(row[:, None] * side + column[None])
            weight.append(part_r[:, None] * part_c[None])
    flat = (torch.stack([_by_token(x[..., None], grid)[:, 0] for x in part]) for part in (index, weight))
    return tuple(x.to(device) for x in flat)


def _by_token(x: Tensor, grid: Grid) -> Tensor:
    """[rows, columns, …] to [l, …] in the order of the merged tokens."""
    m = grid.merge
    x = x.view(grid.rows // m, m, grid.columns // m, m, x.shape[-1])
    return x.transpose(1, 2).reshape(-1, x.shape[-1])
