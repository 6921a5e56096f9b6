"""SAC in the noise space of a frozen flow policy (`algo=dsrl_*`), docs/algorithms/dsrl.md.

    Q_A(s, a)  chunked backup with a' = flow(s', w'), w' ~ π_w      Q_W(s, w) ← Q_A(s, flow(s, w))   distilled
    π_w(w | s) α log π_w − Q_W(s, w)                                 the flow itself: frozen when online

DSRL with noise aliasing (Wagenmaker et al., 2506.15799): the gradient never runs through the flow. In a train stage
the flow is cloned from demonstrations, Q_A warming up on them. Online, a step encodes its batch into a memory and
trains the small networks on a larger draw from it: what a frozen flow made of a transition stays true.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from serl_launcher.agents import shares
from serl_launcher.agents.base import ParameterGroup, feature_dim
from serl_launcher.agents.encoded import Encoded, Memory
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.agents.losses import entropy_surplus, soft_actor_loss, temperature_loss
from serl_launcher.agents.observations import next_observation, observation
from serl_launcher.agents.steering import Steering, steer
from serl_launcher.agents.values import EntropySettings, ValueAgent, critic_metrics, frozen_copy
from serl_launcher.critics.ensemble import ChunkCritic
from serl_launcher.critics.losses import pessimistic, td_loss
from serl_launcher.policies.base import FlowPolicy, Prefix, sample, trainable
from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch
from serl_transport.contract.specs import TaskSpec

AS_RECORDED = ("is_pad", "reward", "discount", "bootstrap", "value_lower_bound")
"""Fields of a TransitionBatch that `Encoded` takes over unchanged."""


@dataclass(frozen=True, kw_only=True)
class DSRLSettings(EntropySettings):
    """`algo.agent` of dsrl_*; config/algo/dsrl_pi0.yaml has the values."""

    prior_share: float  # share of the distillation batch with w from N(0, I): Q_W must know more than π_w's own
    entropy_per_dim: float  # target entropy of π_w, nats for each dim of w; N(0, 1) has 1.42
    memory: int  # encoded transitions that are kept
    memory_batch: int  # drawn from them in each online step

    def build(self, policy: FlowPolicy, task: TaskSpec, horizon: int) -> "DSRLAgent":
        return DSRLAgent(policy, self, feature_dim=feature_dim(policy, task), horizon=horizon)


class DSRLAgent(ValueAgent):
    """Noise policy, critic over actions, critic over noise, temperature.

    policy: with a `steering` module (agents.steering.add_steering). The next action in a target is π_w's of the step
    that encoded it, at most memory / batch steps ago.
    """

    added_to_policy = ("steering.",)
    """Prefixes of parameters that a plain policy's checkpoint lacks; they then keep their initial values."""
    settings: DSRLSettings

    def __init__(self, policy: FlowPolicy, settings: DSRLSettings, *, feature_dim: int, horizon: int) -> None:
        super().__init__(policy, settings, feature_dim=feature_dim, horizon=horizon)
        self.memory = Memory(settings.memory)
        rows, dim = self.steering.rows, self.steering.action_dim
        self.noise_critic = ChunkCritic(feature_dim, rows, dim, settings.critics, settings.widths)
        self.target_entropy = settings.entropy_per_dim * rows * dim

    @property
    def steering(self) -> Steering:
        return self.policy.steering

    # Losses.

    def forward(self, batch: LearningBatch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by group (those whose turn it is), and metrics."""
        data = self.encode(batch.transitions)
        if self.online:
            self.memory.add(data)
            data = self.memory.draw(self.settings.memory_batch)
        losses = {}
        losses["critic"], metrics = self.critic_loss(data)
        metrics["batch/transition_demo_share"] = torch.as_tensor(batch.transitions.demo).float().mean()
        if not self.online:
            losses["policy"], more = imitation_loss(self.policy, batch.imitation, self.settings.noise_samples)
            return losses, metrics | more
        losses["noise_critic"] = self.distillation_loss(data)
        metrics["losses/noise_critic"] = losses["noise_critic"].detach()
        metrics["batch/encoded"] = torch.tensor(float(len(self.memory)))
        if self.warm:
            epsilon = self.draw(len(data), self.steering.rows, data.features.device)
            losses["noise_actor"], losses["temperature"], more = self.noise_actor_loss(data.features, epsilon)
            metrics |= more
        return losses, metrics

    def critic_loss(self, data: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
        """Q_A: squared error to the chunked backup under the policy as it acts."""
        with torch.no_grad():
            value = pessimistic(self.target(data.next_features, data.next_chunk), self.settings.target_members)
            target = self.target_of(data, value)
        q = self.critic(data.features, data.chunk, data.is_pad)
        loss = td_loss(q, target)
        return loss, critic_metrics(loss, q, target, data.bootstrap)

    def distillation_loss(self, data: Encoded) -> Tensor:
        """½ (Q_W(s, w) − Q_A(s, flow(s, w)))²."""
        with torch.no_grad():
            value = self.critic(data.features, data.w_chunk).mean(0)
        return td_loss(self.noise_critic(data.features, data.w), value)

    def noise_actor_loss(self, features: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """mean(α log π_w − Q_W), the temperature's loss, and metrics."""
        drawn = self.steering.draw(features.detach(), epsilon)
        q = functional_call(self.noise_critic, frozen_copy(self.noise_critic), (features.detach(), drawn.w)).mean(0)
        alpha = self.log_alpha.exp()
        loss = soft_actor_loss(drawn.log_prob, q, alpha)
        surplus = entropy_surplus(drawn.log_prob, self.target_entropy)
        metrics = {
            "losses/noise_actor": loss.detach(),
            "actor/q": q.detach().mean(),
            "actor/entropy_surplus": surplus,
            "actor/temperature": alpha.detach(),
            "actor/noise_size": drawn.w.detach().abs().mean(),
        }
        return loss, temperature_loss(self.log_alpha, surplus), metrics

    # Sampling.

    def draw(self, b: int, rows: int, device: torch.device) -> Tensor:
        """Standard normal float32[b, rows, ad]."""
        return shares.normal((b, rows, self.policy.action_dim), device)

    @torch.no_grad()
    def act(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """The executed part of the chunk that grows from this noise: float32[b, h, robot dims]."""
        return self.executed(sample(self.policy, prefix, noise, self.settings.flow_steps), prefix.anchor)

    @torch.no_grad()
    def encode(self, batch: TransitionBatch) -> Encoded:
        """Everything that takes the backbone or the flow."""
        prefix = self.observe(observation(batch))
        features, device = self.policy.features(prefix), prefix.state.device
        after = self.observe(next_observation(batch))
        noise = steer(self.policy, after, self.draw(len(batch), self.policy.action_horizon, device))
        w = self.explore(features)
        return Encoded(
            features=features,
            chunk=self.labels(batch.action, device, prefix.anchor),
            next_features=self.policy.features(after),
            next_chunk=self.act(after, noise),
            w=w,
            w_chunk=self.act(prefix, self.steering.spread(w)),
            **{key: to_device(getattr(batch, key), device) for key in AS_RECORDED},
        )

    def explore(self, features: Tensor) -> Tensor:
        """Noises to distil at: `prior_share` of them from N(0, I) within the bound, the others from π_w."""
        b, bound = len(features), self.steering.bound
        epsilon = self.draw(b, self.steering.rows, features.device)
        rows = shares.rows_of_all(b)
        place = shares.mine(torch.arange(rows, device=features.device))
        from_prior = place < round(rows * self.settings.prior_share)
        own = self.steering.draw(features, epsilon).w
        return torch.where(from_prior[:, None, None], epsilon.clamp(-bound, bound), own)

    # What the learner needs.

    def groups(self) -> dict[str, ParameterGroup]:
        flow = {n: p for n, p in trainable(self.policy).items() if not n.startswith(self.added_to_policy)}
        noise_actor = dict(self.steering.body.named_parameters("steering.body"))
        return {
            "policy": ParameterGroup(flow),
            "noise_actor": ParameterGroup(noise_actor, scheduled=False),
            "critic": ParameterGroup(dict(self.critic.named_parameters("critic")), scheduled=False),
            "noise_critic": ParameterGroup(dict(self.noise_critic.named_parameters("noise_critic")), scheduled=False),
            "temperature": ParameterGroup({"log_alpha": self.log_alpha}, scheduled=False),
        }

    def begin_stage(self, mode: str) -> None:
        """From the first online stage on the flow is frozen: whatever stage comes later trains the noise policy."""
        super().begin_stage("online" if int(self.online_steps) > 0 else mode)
        self.memory.clear()

    def forget_data(self) -> None:
        """The memory holds rewards of before."""
        self.memory.clear()

    @torch.no_grad()
    def after_step(self, taken: Tensor) -> None:
        super().after_step(taken)
        if self.online:
            # Opened once the noise policy has begun to learn; served as soon as the published average follows.
            self.steering.gate.fill_(float(int(self.online_steps) > self.settings.warmup_steps))
