"""Real-time chunking: a new chunk that agrees with what the robot executes while it is computed.

Black et al. 2025, arXiv 2506.07339, algorithm 1. Called by the policy engine for questions that carry the rest of the
running chunk. The flow is steered at each step by pseudo-inverse guidance (ΠGDM, Song et al. 2023): the gradient of a
masked squared error between the chunk that the flow is heading for and the running one, taken through the velocity.

    index      0 … d−1      d … k−1          k … ah−1
    mask       1            e-decay to 0     0
    meaning    executed     agree, softly    free
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from serl_launcher.policies.base import FlowPolicy, Prefix, flow_times

MAX_GUIDANCE = 5.0  # β of the paper; more overshoots with few steps


def soft_mask(delay: int, known: int, horizon: int) -> Tensor:
    """W of equation 5: float32[ah]; 1 on the `delay` first ticks, decaying on those up to `known`, 0 beyond."""
    known = min(known, horizon)
    delay = min(delay, known)
    i = torch.arange(horizon, dtype=torch.float32)
    c = (known - i) / (known - delay + 1)
    decay = c * torch.expm1(c) / (math.e - 1)
    return torch.where(i < delay, 1.0, torch.where(i < known, decay, 0.0))


def guidance_weight(t: float, maximum: float = MAX_GUIDANCE) -> float:
    """min(β, (1 − t) / (t · r²)) with r² = (1 − t)² / (t² + (1 − t)²)."""
    if t <= 0:
        return maximum
    return min(maximum, (t**2 + (1 - t) ** 2) / (t * (1 - t)))


def sample_realtime(
    policy: FlowPolicy, prefix: Prefix, noise: Tensor, steps: int, known: Tensor, mask: Tensor
) -> Tensor:
    """Integrate the guided flow from noise to action: float32[b, ah, ad] in the model's units.

    Args:
        noise: float32[b, ah, ad].
        steps: of forward Euler.
        known: float32[b, ah, ad], the rest of the running chunk from its index 0, model's units; any value where the
            mask is 0.
        mask: float32[b, ah, ad], `soft_mask` over the dims that the robot has, 0 elsewhere.
    """
    if not noise.shape == known.shape == mask.shape:
        raise ValueError(
            f"noise, known and mask differ: {tuple(noise.shape)}, {tuple(known.shape)}, {tuple(mask.shape)}"
        )
    x, prefix = noise, policy.ready(prefix, flow_times(steps, noise.device))
    for k in range(steps):
        x = x + guided_velocity(lambda x, k=k: policy.velocity_at(prefix, x, k), x, k / steps, known, mask) / steps
    return x


def guided_velocity(velocity: Callable[[Tensor], Tensor], x_t: Tensor, t: float, known: Tensor, mask: Tensor) -> Tensor:
    """v + weight · (mask · (known − a))ᵀ ∂a/∂x_t, where a = x_t + (1 − t) v is where the flow is heading."""
    with torch.enable_grad():
        # The Jacobian must go through the velocity: x_t requires grad before v is computed, not after.
        x = x_t.detach().requires_grad_()
        v = velocity(x)
        a = x + (1 - t) * v
        error = (mask * (known - a)).detach()
        (gradient,) = torch.autograd.grad(a, x, error)
    return v.detach() + guidance_weight(t) * gradient
