"""Critics beside a flow policy that choose among its chunks: of n that share a prefix the one of most value is sent.

agents.implicit_q trains them; the policy engine serves them as part of the policy (`served_chunks`), because
`add_chooser` attaches them as the module `chooser`, so that they are published with the rest. Until its gate opens the
first chunk is taken, and the policy is the plain flow. Source: IDQL (Hansen-Estruch et al., 2304.10573), whose implicit
policy is this choice among the samples of a behaviour policy, here greedy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from serl_launcher.agents.steering import steer, steers
from serl_launcher.critics.ensemble import ChunkCritic
from serl_launcher.policies.base import FlowPolicy, Prefix, sample


class Chooser(nn.Module):
    """An ensemble Q(features, executed ticks) and how many chunks it chooses among.

    candidates: n. horizon: ticks of a chunk that are executed. widths: hidden layers of a member, units each.
    """

    def __init__(
        self, feature_dim: int, robot_dim: int, horizon: int, candidates: int, critics: int, widths: Sequence[int]
    ) -> None:
        super().__init__()
        if candidates < 1:
            raise ValueError(f"algo.served.candidates: expected 1 or more, got {candidates}")
        self.candidates = candidates
        self.critic = ChunkCritic(feature_dim, horizon, robot_dim, critics, widths)
        # A parameter, so that it is published; no optimizer moves it.
        self.gate = nn.Parameter(torch.zeros(()))


def add_chooser(
    policy: FlowPolicy, feature_dim: int, horizon: int, candidates: int, critics: int, widths: Sequence[int]
) -> FlowPolicy:
    """The same policy with a `chooser` module; `algo.served` names this function."""
    policy.chooser = Chooser(feature_dim, policy.robot_dim, horizon, candidates, critics, widths)
    return policy


def candidates(policy: FlowPolicy) -> int:
    """Chunks that are sampled for each one that is sent."""
    chooser = getattr(policy, "chooser", None)
    return 1 if chooser is None else chooser.candidates


def reads_features(policy: FlowPolicy) -> bool:
    """Whether what is served depends on `policy.features`."""
    return steers(policy) or candidates(policy) > 1


def served_chunks(policy: FlowPolicy, prefix: Prefix, noise: Tensor, steps: int) -> Tensor:
    """What is sent for each row of the prefix: float32[b, ah, ad], the model's units.

    noise: float32[b·candidates, ah, ad], those of one observation adjacent.
    """
    n = candidates(policy)
    if n == 1:
        return sample(policy, prefix, steer(policy, prefix, noise), steps)
    return best_chunks(policy, prefix, sample(policy, prefix, noise, steps, n))


def best_chunks(policy: FlowPolicy, prefix: Prefix, chunks: Tensor) -> Tensor:
    """The chunk of most value among the n of each observation, the first while the gate is closed: float32[b, ah, ad].

    chunks: float32[b·n, ah, ad]. A chunk is worth what the least of the members says of it. Nothing is read back.
    """
    n = candidates(policy)
    if n == 1:
        return chunks
    value = values(policy, policy.chooser.critic, prefix, chunks, n).min(0).values
    best = torch.where(policy.chooser.gate > 0.5, value.argmax(1), 0)
    return chunks.view(-1, n, *chunks.shape[1:])[torch.arange(len(best), device=best.device), best]


def values(policy: FlowPolicy, critic: ChunkCritic, prefix: Prefix, chunks: Tensor, n: int) -> Tensor:
    """Q of what the robot would be sent for each of the n chunks of an observation: float32[members, b, n].

    chunks: float32[b·n, ah, ad]; the features are of the pass that encoded the prefix.
    """
    anchor = None if prefix.anchor is None else prefix.anchor.repeat_interleave(n, 0)
    executed = policy.normalise_actions(policy.physical_actions(chunks[:, : critic.horizon], anchor), anchor)
    features = policy.features(prefix).repeat_interleave(n, 0)
    return critic(features, executed[..., : policy.robot_dim]).view(critic.n, -1, n)
