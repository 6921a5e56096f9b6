"""The mask of the fused attention, for the layers of ours that pi0.gemma, groot.head and groot.qwen run."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores: 0 where keep bool[..., l] is True, else −∞. Its storage is padded to eights,
    as the fused kernels want it."""
    length = keep.shape[-1]
    bias = torch.zeros(*keep.shape[:-1], -(-length // 8) * 8, dtype=dtype, device=keep.device)[..., :length]
    return bias.masked_fill_(~keep, -torch.inf)
