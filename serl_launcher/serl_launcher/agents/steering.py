"""A small stochastic policy over the noise that a flow policy starts from: a = flow(s, w), w ~ π_w(s).

DSRL (Wagenmaker et al., 2506.15799) trains it; the policy server uses it as part of the policy, because `add_steering`
attaches it as the module `steering`, so that it is published with the rest. Until its gate opens (the first online
stage) the noise passes unchanged and the policy is the plain flow.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from serl_launcher.agents.flow_path import log_tanh_slope
from serl_launcher.policies.base import FlowPolicy, Prefix

VARIANTS = ("per_step", "tiled")
LOG_STD_LOW, LOG_STD_HIGH = -4.0, 1.0


@dataclass(frozen=True, slots=True)
class NoiseDraw:
    """Noises of a batch."""

    w: Tensor  # float32[b, rows, ad]; rows: ah, or 1 for the tiled variant
    log_prob: Tensor  # float32[b], of w


class Steering(nn.Module):
    """π_w: features -> w = bound · tanh(u), u ~ N(μ(s), σ(s)²).

    variant: per_step, a noise for each tick of the chunk; tiled, one noise repeated over the horizon (the paper's
    choice for large policies). bound: |w| stays below it.
    """

    def __init__(
        self, feature_dim: int, action_horizon: int, action_dim: int, variant: str, bound: float, width: int = 128
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"algo.served.variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        self.rows = action_horizon if variant == "per_step" else 1
        self.action_horizon, self.action_dim, self.bound = action_horizon, action_dim, bound
        dims = self.rows * action_dim
        self.body = nn.Sequential(
            nn.Linear(feature_dim, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2 * dims),
        )  # fmt: skip
        # At the start w has mean 0 and about the spread of N(0, 1) within the bound.
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)
        with torch.no_grad():
            self.body[-1].bias[dims:] = math.log(1 / bound) if bound > 1 else 0.0
        # A parameter, so that it is published; no optimizer moves it.
        self.gate = nn.Parameter(torch.zeros(()))

    def draw(self, features: Tensor, epsilon: Tensor) -> NoiseDraw:
        """w and its density; differentiable. epsilon: float32[b, rows, ad], standard normal."""
        mean, log_std = self.body(features).view(len(features), 2, self.rows, self.action_dim).unbind(1)
        log_std = log_std.clamp(LOG_STD_LOW, LOG_STD_HIGH)
        u = mean + log_std.exp() * epsilon
        log_prob = -0.5 * epsilon.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - log_tanh_slope(u) - math.log(self.bound)
        return NoiseDraw(self.bound * u.tanh(), log_prob.sum((1, 2)))

    def spread(self, w: Tensor) -> Tensor:
        """w as the noise of a whole chunk: float32[b, ah, ad]."""
        return w.expand(-1, self.action_horizon, -1)

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """The noise to start the flow from, float32[b, ah, ad], when a sampler has drawn `noise` of that shape."""
        steered = self.spread(self.draw(features, noise[:, : self.rows]).w)
        return torch.where(self.gate > 0.5, steered, noise)


def add_steering(policy: FlowPolicy, feature_dim: int, variant: str, bound: float) -> FlowPolicy:
    """The same policy with a `steering` module; `algo.served` names this function."""
    steering = Steering(feature_dim, policy.action_horizon, policy.action_dim, variant, bound)
    policy.steering = steering
    return policy


def steers(policy: FlowPolicy) -> bool:
    """Whether `steer` asks the policy for features."""
    return getattr(policy, "steering", None) is not None


def steer(policy: FlowPolicy, prefix: Prefix, noise: Tensor) -> Tensor:
    """The noise that this policy starts its flow from; `noise` itself where nothing steers."""
    steering = getattr(policy, "steering", None)
    return noise if steering is None else steering(policy.features(prefix), noise)
