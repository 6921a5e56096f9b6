"""SAC in the noise space of a frozen flow policy (`algo=dsrl_*`), docs/algorithms/dsrl.md.

    Q_A(s, a)  chunked backup with a' = flow(s', w'), w' ~ π_w      Q_W(s, w) ← Q_A(s, flow(s, w))   distilled
    π_w(w | s) α log π_w − Q_W(s, w)                                 the flow itself: never touched when online

DSRL with noise aliasing (Wagenmaker et al., 2506.15799): the gradient never runs through the flow. In a train stage
the flow is cloned from demonstrations, Q_A warming up on them. Online, a step encodes its batch into a memory and
trains the small networks on a larger draw from it: what a resting flow said of a transition stays true.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from serl_launcher.agents.base import (
    FlowAgent,
    ParameterGroup,
    check_horizon,
    check_members,
    check_values,
    critic_metrics,
    frozen_copy,
)
from serl_launcher.agents.encoded import Encoded, Memory
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.agents.steering import Steering, steer
from serl_launcher.critics.ensemble import ChunkCritic, track
from serl_launcher.critics.losses import pessimistic, td_loss
from serl_launcher.policies.base import FlowPolicy, Prefix, sample, trainable
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch

TOLD = ("is_pad", "reward", "discount", "bootstrap", "floor")
"""What a transition says itself."""


class DSRLAgent(FlowAgent):
    """Noise policy, critic over actions, critic over noise, temperature.

    policy: with a `steering` module (agents.steering.add_steering). Settings as in SACAgent; prior_share: part of the
    distillation batch whose w comes from N(0, I) within the bound, so that Q_W knows more than π_w's own noise;
    entropy_per_dim: target entropy of π_w for each dim of w (N(0, 1) has 1.42). memory: encoded transitions that are
    kept; memory_batch: drawn from them in each online step. The next action in a target is π_w's of the step that
    encoded it, at most memory / batch steps ago.
    """

    fresh = ("steering.",)
    """Names that a plain checkpoint of the policy lacks; they start anew."""

    def __init__(
        self,
        policy: FlowPolicy,
        prompt: str,
        *,
        feature_dim: int,
        horizon: int,
        flow_steps: int = 6,
        critics: int = 4,
        widths: Sequence[int] = (256, 256),
        tau: float = 0.005,
        target_members: int = 2,
        warmup_steps: int = 200,
        noise_samples: int = 4,
        prior_share: float = 0.5,
        entropy_per_dim: float = 0.5,
        init_temperature: float = 0.01,
        return_bound: bool = False,
        q_limit: float = 1e3,
        memory: int = 4096,
        memory_batch: int = 256,
    ) -> None:
        super().__init__()
        check_horizon(horizon, policy)
        check_members(target_members, critics)
        self.policy, self.prompt, self.horizon = policy, prompt, horizon
        self.flow_steps, self.tau, self.target_members = flow_steps, tau, target_members
        self.warmup_steps, self.noise_samples, self.prior_share = warmup_steps, noise_samples, prior_share
        self.return_bound, self.q_limit = return_bound, q_limit
        self.memory, self.memory_batch = Memory(memory), memory_batch
        steering = self.steering
        self.critic = ChunkCritic(feature_dim, horizon, policy.robot_dim, critics, widths)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.noise_critic = ChunkCritic(feature_dim, steering.rows, steering.action_dim, critics, widths)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(init_temperature)))
        self.target_entropy = entropy_per_dim * steering.rows * steering.action_dim
        self._mode = "train"
        self.register_buffer("online_steps", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def steering(self) -> Steering:
        return self.policy.steering

    # What the learner needs.

    def groups(self) -> dict[str, ParameterGroup]:
        def named(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
            return {f"{prefix}.{name}": p for name, p in module.named_parameters()}

        flow = {n: p for n, p in trainable(self.policy).items() if not n.startswith("steering.")}
        return {
            "policy": ParameterGroup(flow),
            "noise_actor": ParameterGroup(named("steering.body", self.steering.body), scheduled=False),
            "critic": ParameterGroup(named("critic", self.critic), scheduled=False),
            "noise_critic": ParameterGroup(named("noise_critic", self.noise_critic), scheduled=False),
            "temperature": ParameterGroup({"log_alpha": self.log_alpha}, scheduled=False),
        }

    def trainable_state(self) -> dict[str, Tensor]:
        return trainable(self.policy)

    def carried(self) -> dict[str, Tensor]:
        target = {f"target.{name}": p.detach() for name, p in self.target.named_parameters()}
        return target | {"online_steps": self.online_steps}

    def begin_stage(self, mode: str) -> None:
        """From the first online stage on the flow rests: whatever comes later trains the noise policy."""
        self._mode = "online" if self.online_steps > 0 else mode
        self.memory.clear()

    @torch.no_grad()
    def after_step(self) -> None:
        track(self.target, self.critic, self.tau)
        if self._mode == "online":
            self.online_steps += 1
            # Opened once the noise policy has begun to learn; served as soon as the published average follows.
            self.steering.gate.fill_(float(self.online_steps > self.warmup_steps))

    # Losses.

    def forward(self, batch: LearningBatch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by group (those whose turn it is), and metrics."""
        transitions, online = batch.transitions, self._mode == "online"
        data = self.encode(transitions)
        if online:
            self.memory.add(data)
            data = self.memory.draw(self.memory_batch)
        losses = {}
        losses["critic"], metrics = self.critic_loss(data)
        metrics["batch/transition_demo_share"] = torch.as_tensor(transitions.demo).float().mean()
        if not online:
            losses["policy"], more = imitation_loss(self.policy, self.prompt, batch.imitation, self.noise_samples)
            return losses, metrics | more
        losses["noise_critic"] = self.distillation_loss(data)
        metrics["losses/noise_critic"] = losses["noise_critic"].detach()
        metrics["batch/encoded"] = torch.tensor(float(len(self.memory)))
        if self.online_steps >= self.warmup_steps:
            epsilon = self.draw(len(data), self.steering.rows, data.features.device)
            losses["noise_actor"], losses["temperature"], more = self.noise_actor_loss(data.features, epsilon)
            metrics |= more
        return losses, metrics

    def draw(self, b: int, rows: int, device: torch.device) -> Tensor:
        """Standard normal float32[b, rows, ad]."""
        return torch.randn(b, rows, self.policy.action_dim, device=device)

    @torch.no_grad()
    def act(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """The executed part of the chunk that grows from this noise: float32[b, h, robot dims]."""
        return self.executed(sample(self.policy, prefix, noise, self.flow_steps))

    @torch.no_grad()
    def encode(self, batch: TransitionBatch) -> Encoded:
        """Everything that takes the backbone or the flow."""
        prefix = self.observe(batch.images, batch.state)
        features, device = self.policy.features(prefix), prefix.state.device
        after = self.observe(batch.next_images, batch.next_state)
        noise = steer(self.policy, after, self.draw(len(batch), self.policy.action_horizon, device))
        w = self.explore(features)
        told = {key: torch.as_tensor(getattr(batch, key), device=device) for key in TOLD}
        return Encoded(
            features=features,
            chunk=self.labels(batch.action, device),
            next_features=self.policy.features(after),
            next_chunk=self.act(after, noise),
            w=w,
            w_chunk=self.act(prefix, self.steering.spread(w)),
            **told,
        )

    def explore(self, features: Tensor) -> Tensor:
        """Noises to distil at: `prior_share` of them from N(0, I) within the bound, the rest from π_w."""
        b, bound = len(features), self.steering.bound
        epsilon = self.draw(b, self.steering.rows, features.device)
        from_prior = torch.arange(b, device=features.device) < round(b * self.prior_share)
        own = self.steering.draw(features, epsilon).w
        return torch.where(from_prior[:, None, None], epsilon.clamp(-bound, bound), own)

    def critic_loss(self, data: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
        """Q_A: squared error to the chunked backup under the policy as it acts."""
        with torch.no_grad():
            value = pessimistic(self.target(data.next_features, data.next_chunk), self.target_members)
            target = self.target_of(data, value)
        q = self.critic(data.features, data.chunk, data.is_pad)
        check_values(q, self.q_limit)
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
        loss = (alpha.detach() * drawn.log_prob - q).mean()
        surplus = (-drawn.log_prob - self.target_entropy).detach().mean()
        metrics = {
            "losses/noise_actor": loss.detach(),
            "actor/q": q.detach().mean(),
            "actor/entropy_surplus": surplus,
            "actor/temperature": alpha.detach(),
            "actor/noise_size": drawn.w.detach().abs().mean(),
        }
        return loss, self.log_alpha * surplus, metrics
