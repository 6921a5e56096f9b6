"""Best of n by Q (`algo=best_of_n_*`), docs/algorithms/best_of_n.md: the flow imitates, critics choose.

    flow      flow matching on accepted chunks, in every step, as in rejection sampling
    critic    train stage and warm-up: the return that followed      then: r + γ^k max over n of Q̄(s', a'_i)
    served    of n chunks the one of most value (agents.choosing)

No gradient of a value enters the flow, so imitation cannot drown it, and what the flow has learned of people stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serl_launcher.agents import shares
from serl_launcher.agents.base import ParameterGroup, feature_dim
from serl_launcher.agents.choosing import values
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.agents.observations import next_observation, observation
from serl_launcher.agents.values import ValueAgent, ValueSettings, critic_metrics
from serl_launcher.critics.losses import pessimistic, td_loss
from serl_launcher.policies.base import FlowPolicy, Prefix, sample, trainable
from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings(ValueSettings):
    """`algo.agent` of best_of_n_*; config/algo/best_of_n_pi0.yaml has the values."""

    backup_samples: int  # chunks whose largest value is that of the next state

    def build(self, policy: FlowPolicy, task: TaskSpec, horizon: int) -> "BestOfNAgent":
        return BestOfNAgent(policy, self, feature_dim=feature_dim(policy, task), horizon=horizon)


class BestOfNAgent(ValueAgent):
    """policy: with a `chooser` module (agents.choosing.add_chooser), whose critics are trained."""

    added_to_policy = ("chooser.",)
    """Prefixes of parameters that a plain policy's checkpoint lacks; they then keep their initial values."""
    settings: BestOfNSettings

    def __init__(self, policy: FlowPolicy, settings: BestOfNSettings, *, feature_dim: int, horizon: int) -> None:
        critic = policy.chooser.critic
        if critic.horizon != horizon:
            raise ValueError(f"algo.served.horizon: expected rollout.execute_horizon {horizon}, got {critic.horizon}")
        super().__init__(policy, settings, feature_dim=feature_dim, horizon=horizon, critic=critic)

    def forward(self, batch: LearningBatch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of `critic`, and of `policy` where something is accepted, and metrics."""
        transitions = batch.transitions
        prefix = self.observe(observation(transitions))
        losses = {}
        losses["critic"], metrics = self.critic_loss(transitions, prefix)
        metrics["batch/transition_demo_share"] = torch.as_tensor(transitions.demo).float().mean()
        if batch.imitation is not None:
            losses["policy"], more = imitation_loss(self.policy, batch.imitation, self.settings.noise_samples)
            metrics |= more
        return losses, metrics

    def critic_loss(self, batch: TransitionBatch, prefix: Prefix) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error to the return that followed, or to the backup once the critic is warm."""
        device = prefix.state.device
        with torch.no_grad():
            target = self.backup(batch) if self.warm else to_device(batch.return_to_go, device)
        labels = self.labels(batch.action, device, prefix.anchor)
        q = self.critic(self.policy.features(prefix), labels, to_device(batch.is_pad, device))
        loss = td_loss(q, target)
        return loss, critic_metrics(loss, q, target, batch.bootstrap)

    def backup(self, batch: TransitionBatch) -> Tensor:
        """y = r + γ^k max_i min over members of Q̄(s', a'_i), a' the flow's own: float32[b], without gradient."""
        n, policy = self.settings.backup_samples, self.policy
        prefix = self.observe(next_observation(batch))
        shape = (len(batch) * n, policy.action_horizon, policy.action_dim)
        chunks = sample(policy, prefix, shares.normal(shape, prefix.state.device), self.settings.flow_steps, n)
        q = values(policy, self.target, prefix, chunks, n)
        return self.target_of(batch, pessimistic(q.flatten(1), self.settings.target_members).view(-1, n).max(1).values)

    def groups(self) -> dict[str, ParameterGroup]:
        flow = {n: p for n, p in trainable(self.policy).items() if not n.startswith(self.added_to_policy)}
        return {
            "policy": ParameterGroup(flow),
            "critic": ParameterGroup(dict(self.critic.named_parameters("chooser.critic")), scheduled=False),
        }

    @torch.no_grad()
    def after_step(self, taken: Tensor) -> None:
        super().after_step(taken)
        if self.online:
            # Opened once the critic is warm; served as soon as the published average follows.
            self.policy.chooser.gate.fill_(float(int(self.online_steps) > self.settings.warmup_steps))
