"""An ensemble of chunk critics Q_i(features, chunk): LayerNorm MLPs evaluated in one batched product.

Agents own one and its target copy. LayerNorm keeps values bounded where there is no data (RLPD, Ball et al.,
2302.02948); the chunk enters whole (Q-chunking, Li et al., 2507.07969).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu


class EnsembleLinear(nn.Module):
    """n linear layers side by side: float32[n, b, in] -> float32[n, b, out]."""

    def __init__(self, n: int, size_in: int, size_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(size_in)
        self.weight = nn.Parameter(torch.empty(n, size_in, size_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n, 1, size_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class ChunkCritic(nn.Module):
    """n critics of (features, chunk of h actions, pad mask).

    feature_dim: f of `policy.features`; horizon: h; action_dim: ad of the robot; widths: hidden layers.
    """

    def __init__(self, feature_dim: int, horizon: int, action_dim: int, n: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.horizon, self.action_dim, self.n = horizon, action_dim, n
        sizes = [feature_dim + horizon * (action_dim + 1), *widths]
        self.layers = nn.ModuleList(EnsembleLinear(n, a, b) for a, b in pairwise(sizes))
        self.head = EnsembleLinear(n, sizes[-1], 1)

    def forward(self, features: Tensor, chunk: Tensor, is_pad: Tensor | None = None) -> Tensor:
        """Q: float32[n, b]. features float32[b, f]; chunk float32[b, h, ad], model units; is_pad bool[b, h].

        A padded tick enters as zero action and a raised flag, whatever `chunk` holds there: nothing was executed.
        """
        if chunk.shape[1:] != (self.horizon, self.action_dim):
            want = (self.horizon, self.action_dim)
            raise ValueError(f"critic: expected a chunk of shape [b, {want[0]}, {want[1]}], got {tuple(chunk.shape)}")
        keep = torch.ones_like(chunk[..., :1]) if is_pad is None else (~is_pad)[..., None].to(chunk.dtype)
        chunk = torch.where(keep.bool(), chunk, torch.zeros_like(chunk))
        x = torch.cat([features, chunk.flatten(1), 1 - keep[..., 0]], dim=-1)
        x = x.expand(self.n, *x.shape)
        for layer in self.layers:
            x = silu(layer_norm(layer(x), layer.bias.shape[-1:]))
        return self.head(x).squeeze(-1)
