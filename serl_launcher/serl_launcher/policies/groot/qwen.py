"""The layers of GR00T's backbone (Qwen3-VL) in one call: images and prompt tokens in, features of every token out.

groot.head calls `run_backbone` with `attention: sdpa`. Against the library's call: images of one size go
through the vision tower as one batch, nothing waits for the device (grids are known on the host, no shape depends on
values), so that it runs in a CUDA graph and on the meta device, and each layer is checkpointed once. Rotary tables and
masks are made once for all layers; queries and keys turn together, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.attention import attention_bias
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
    qk, v = attention.qkv(block.norm1(x)).reshape(shape).split([2, 1], dim=2)
    q, k = rotate(qk, cos, sin).to(v.dtype).unbind(2)
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v.squeeze(2))), scale=attention.scaling)
    x = x + attention.proj(out.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def text_layer(layer: Any, x: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One layer of Qwen3 or Qwen3-VL over float[b, l, width]; bias: float[b, 1, l, l], added to attention's scores;
    cos, sin: float32[b, l, 1, head_dim] of `rotary`."""
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)) for y in _project(attention, _norm(layer.input_layernorm, x)))
    heads = q.shape[2]
    qk = rotate(torch.cat([_norm(attention.q_norm, q), _norm(attention.k_norm, k)], dim=2), cos, sin)
    q, k = qk.split([heads, k.shape[2]], dim=2)
    # A key-value head serves several query heads; the kernels that take a bias want them all.
    k, v = (y[:, :, :, None].expand(-1, -1, -1, heads // v.shape[2], -1).to(v.dtype).flatten(2, 3) for y in (k, v))
    q, k, v = (y.transpose(1, 2) for y in (q.to(v.dtype), k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scaling)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    gate, up = _gate_up(mlp, _norm(layer.post_attention_layernorm, x))
    return x + mlp.down_proj(mlp.act_fn(gate) * up)


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; one product where groot.fusing has laid the weights side by side."""
    fused = getattr(attention, "qkv", None)
    if fused is None:
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    parts = [len(layer.weight) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return F.linear(x, *fused).split(parts, dim=-1)


def _gate_up(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    fused = getattr(mlp, "gate_up", None)
    return (mlp.gate_proj(x), mlp.up_proj(x)) if fused is None else F.linear(x, *fused).chunk(2, dim=-1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """The library's RMS norm, in one call; in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)


def run_backbone(
    model: nn.Module,
    ids: Tensor,
    valid: Tensor,
    pixels: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    checkpointing: bool,
    vision_function: Callable,
    text_function: Callable,
) -> Tensor:
    """Output of the last language layer, before the final norm: float[b, l, width].

    model: `Qwen3VLModel`; ids: int64[b, l]; valid: bool[b, l], False for padding; pixels: float32[b·images·patches,
    3·2·16²] as Qwen's processor flattens them; every sample has the same number of images. dtype: what attention
    computes in. vision_function, text_function: the two functions above, or what torch.compile made of them.
    """
    seen, deep = _see(model.visual, pixels, grid, checkpointing, vision_function)
    is_image = ids == model.config.image_token_id
    language = model.language_model
    places = image_places(is_image, len(seen) // len(ids))
    x = place_images(language.embed_tokens(ids), seen, places)
    tables = rotary(language, rope_positions(is_image, valid, grid))
    bias = attention_bias(causal_mask(valid), dtype)
    for index, layer in enumerate(language.layers):
        x = run_layer(checkpointing, text_function, layer, x, bias, *tables)
        # What is added behind the last layer, the action head does not see: it reads that layer's output.
        if index < len(deep) and index + 1 < len(language.layers):
            x = place_images(x, deep[index], places, add=True)
    return x


def _see(
    visual: Any, pixels: Tensor, grid: Grid, checkpointing: bool, block_function: Callable
) -> tuple[Tensor, list[Tensor]]:
    """Tokens of all images float[n·tokens, width of the language model], and the features of inner layers."""
    # A convolution whose stride is its size is a matrix product.
    embed = visual.patch_embed.proj
    x = F.linear(pixels.to(embed.weight.dtype), embed.weight.flatten(1), embed.bias)
    index, weight = patch_positions(grid, visual.num_grid_per_side, x.device)
    position = (visual.pos_embed(index) * weight[..., None].to(visual.pos_embed.weight.dtype)).sum(0)
    x = x.view(-1, grid.rows * grid.columns, x.shape[-1]) + position
    angles = patch_places(grid, x.device)[..., None] * visual.rotary_pos_emb.inv_freq.float()
    cos, sin = signed(angles.flatten(1).repeat(1, 2)[:, None, None])
    deep: list[Tensor] = []
    taps = list(visual.deepstack_visual_indexes)
    for k, block in enumerate(visual.blocks):
        x = run_layer(checkpointing, block_function, block, x, cos, sin)
        if k in taps:
            deep.append(visual.deepstack_merger_list[taps.index(k)](x.flatten(0, 1)))
    return visual.merger(x.flatten(0, 1)), deep


def rotary(language: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of a language model's tokens: float32[b, l, 1, head_dim] each. positions: int64[b, l] or
    [3, b, l]."""
    cos, sin = language.rotary_emb(positions.float(), positions)
    first, second = sin.chunk(2, dim=-1)
    return cos[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]


def signed(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and sines of which the first half is negative, as `rotate` wants them."""
    first, second = angles.sin().chunk(2, dim=-1)
    return angles.cos(), torch.cat([-first, second], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in fp32, float[..., heads, head_dim]: x · cos + (−x₂, x₁) · |sin|."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)


def image_places(is_image: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Which tokens of is_image bool[b, l] are of no image, and how many image tokens of its sample stand before each:
    bool and int64[b, l, 1]. tokens: image tokens of a sample."""
    return ~is_image[..., None], (is_image.cumsum(1) - 1).clamp(0, tokens - 1)[..., None]


def place_images(x: Tensor, images: Tensor, places: tuple[Tensor, Tensor], add: bool = False) -> Tensor:
    """x with its image tokens replaced, in order, or the images added to them. images: float[b·tokens of a sample,
    width]; places: `image_places`."""
    no_image, index = places
    images = images.view(len(x), -1, x.shape[-1])
    spread = images.gather(1, index.expand(-1, -1, x.shape[-1])).to(x.dtype)
    return torch.where(no_image, x, x + spread if add else spread)


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
