"""What a critic learns from: the chunked backup, the squared error to it, and the optional Cal-QL term.

Pure functions of tensors, called by the agents.
"""

import math

import torch
from torch import Tensor


def chunk_target(reward: Tensor, discount: Tensor, bootstrap: Tensor, next_value: Tensor) -> Tensor:
    """y = Σ_{i<k} γ^i r_i + γ^k Q̄(s_{t+k}, a'), the last term only where the chunk did not terminate: float32[b].

    reward: the discounted sum over the k real ticks; discount: γ^k; bootstrap: bool[b].
    """
    return reward + torch.where(bootstrap, discount * next_value, torch.zeros_like(next_value))


def pessimistic(q: Tensor, n: int) -> Tensor:
    """Minimum over n randomly drawn members of float32[e, b] (REDQ, Chen et al., 2101.05982): float32[b]."""
    return (q if n == len(q) else q[torch.randperm(len(q), device=q.device)[:n]]).min(dim=0).values


def td_loss(q: Tensor, target: Tensor) -> Tensor:
    """½ (Q_i − y)², mean over members and batch: a scalar. q float32[e, b], target float32[b] without gradient."""
    return 0.5 * (q - target.detach()).square().mean()


def expectile_loss(value: Tensor, target: Tensor, expectile: float) -> Tensor:
    """½ |τ − 1(y < V)| (y − V)², mean over the batch (IQL, Kostrikov et al., 2110.06169): a scalar.

    value: float32[b]; target: y, float32[b] without gradient; expectile: τ.
    """
    above = target.detach() - value
    return 0.5 * (torch.where(above < 0, 1 - expectile, expectile) * above.square()).mean()


def cal_ql(q_data: Tensor, q_policy: Tensor, q_random: Tensor, return_to_go: Tensor) -> Tensor:
    """Calibrated conservative term (Nakamoto et al., 2303.05479): push values of unseen actions down, not below V^μ.

    q_data: float32[e, b], of executed chunks; q_policy, q_random: float32[e, b, m], of the policy's chunks and of
    uniform ones; return_to_go: float32[b], of the data, the calibration. Returns a scalar. The samples carry no
    importance weights: a flow's chunk has no density of its own (its path has), and weights of the uniform chunks alone
    would drown the policy's.
    """
    calibrated = torch.maximum(q_policy, return_to_go[None, :, None])
    together = torch.cat([calibrated, q_random], dim=-1)
    soft_maximum = torch.logsumexp(together, dim=-1) - math.log(together.shape[-1])
    return (soft_maximum - q_data).mean()
