"""The losses of an actor that has a density, and of the temperature that holds its entropy.

Pure functions of tensors, called by agents.sac and agents.dsrl; the critics' are in critics.losses. log_prob and q are
float32[b], of actions that the actor drew; α is a scalar.
"""

from torch import Tensor

from serl_launcher.agents.shares import mean_of_all


def soft_actor_loss(log_prob: Tensor, q: Tensor, alpha: Tensor) -> Tensor:
    """E[ α log π − Q ], a scalar; α gets no gradient (Haarnoja et al., 1801.01290)."""
    return (alpha.detach() * log_prob - q).mean()


def mean_size(q: Tensor) -> Tensor:
    """|Q|, the batch's mean size as a scalar without gradient: α and λ then mean the same on every task (TD3+BC)."""
    return mean_of_all(q.detach().abs().mean()).clamp(min=1e-6)


def behaviour_loss(chunk: Tensor, reference: Tensor) -> Tensor:
    """‖a − a_ref‖², mean over batch, ticks and dims. Chunks float32[b, ah, ad] that grew from the same noise."""
    return (chunk - reference).square().mean()


def entropy_surplus(log_prob: Tensor, target_entropy: float) -> Tensor:
    """H − H̄ with H = E[ −log π ]: a scalar without gradient, in nats; below 0 there is too little."""
    return (-log_prob - target_entropy).detach().mean()


def temperature_loss(log_alpha: Tensor, surplus: Tensor) -> Tensor:
    """log α · (H − H̄): too little entropy (surplus < 0) raises α."""
    return log_alpha * surplus
