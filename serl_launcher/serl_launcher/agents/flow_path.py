"""A stochastic path through a flow, and its exact log density.

A flow's deterministic sampler has no tractable density. With Gaussian noise σ_k added to each of K Euler steps every
transition has one (SAC-Flow, Zhang et al., 2509.25756), and so has the path:

    log p = log N(x_0; 0, I) + Σ_k log N(x_{k+1}; x_k + v_k Δ, σ_k²)  [ − Σ log(1 − tanh² x_K) ]      Δ = 1/K

The last term when the action is tanh x_K. Called by agents.sac.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

Velocity = Callable[[Tensor, int], Tensor]
"""(x float32[b, ah, ad], step k) -> v float32[b, ah, ad] at t = k / K"""

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, slots=True)
class FlowPath:
    """b sampled paths."""

    chunk: Tensor  # float32[b, ah, ad], the action: x_K, or tanh x_K
    log_prob: Tensor  # float32[b], of the whole path, over the robot's dims


def sample_path(
    velocity: Velocity, noise: Tensor, step_noise: Tensor, log_std: Tensor, robot_dim: int, squash: bool
) -> FlowPath:
    """Follow the flow from `noise`, disturbed at each step; differentiable in velocity and log_std.

    noise: float32[b, ah, ad], x_0; step_noise: float32[K, b, ah, ad], standard normal; log_std: float32[K, b, 1 | ah,
    robot_dim], log σ_k. Dims beyond robot_dim are not disturbed and not counted: given x_0 they are a function of the
    rest.
    """
    steps = len(step_noise)
    x = noise
    log_prob = _standard_normal(noise[..., :robot_dim])
    for k in range(steps):
        moved = x + velocity(x, k) / steps
        epsilon = step_noise[k][..., :robot_dim]
        disturbed = moved[..., :robot_dim] + log_std[k].exp() * epsilon
        x = torch.cat([disturbed, moved[..., robot_dim:]], dim=-1)
        # At the sampled point the standardised residual is ε itself, so only σ has a gradient here.
        log_prob = log_prob + _standard_normal(epsilon) - log_std[k].expand_as(epsilon).sum((1, 2))
    if squash:
        log_prob = log_prob - log_tanh_slope(x[..., :robot_dim]).sum((1, 2))
        x = x.tanh()
    return FlowPath(x, log_prob)


def log_tanh_slope(x: Tensor) -> Tensor:
    """log(1 − tanh² x), without the overflow of the plain form."""
    return 2 * (math.log(2) - x - softplus(-2 * x))


def path_entropy(steps: int, dims: int, std: float) -> float:
    """Entropy of a path whose K steps all have noise `std`, before tanh: the scale on which targets are set.

    dims: ah · robot dims.
    """
    per_normal = HALF_LOG_2PI + 0.5
    return dims * (per_normal + steps * (per_normal + math.log(std)))


class NoiseScale(nn.Module):
    """log σ of each flow step, as a small function of the features: bounded, one value a step and action dim.

    unit: float32[robot_dim], what initial, low and high are shares of; None: 1, the model's own units.
    """

    def __init__(
        self,
        feature_dim: int,
        steps: int,
        robot_dim: int,
        initial: float,
        low: float,
        high: float,
        unit: Tensor | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        if not 0 < low < initial < high:
            raise ValueError(f"algo.agent: expected 0 < min_std < init_std < max_std, got {low}, {initial} and {high}")
        self.steps, self.robot_dim = steps, robot_dim
        self._low, self._range = math.log(low), math.log(high) - math.log(low)
        self.register_buffer("log_unit", torch.zeros(robot_dim) if unit is None else unit.log(), persistent=False)
        self.body = nn.Sequential(nn.Linear(feature_dim, width), nn.SiLU(), nn.Linear(width, steps * robot_dim))
        share = (math.log(initial) - self._low) / self._range
        nn.init.zeros_(self.body[2].weight)
        nn.init.constant_(self.body[2].bias, math.log(share / (1 - share)))

    def forward(self, features: Tensor) -> Tensor:
        """float32[b, f] -> log σ: float32[K, b, 1, robot_dim]."""
        raw = self.body(features).view(len(features), self.steps, 1, self.robot_dim)
        return (self._low + self._range * raw.sigmoid() + self.log_unit).movedim(1, 0)


def _standard_normal(x: Tensor) -> Tensor:
    """Σ log N(x; 0, 1) over all but the first axis: float32[b]."""
    return (-0.5 * x.square() - HALF_LOG_2PI).flatten(1).sum(1)
