"""Soft actor-critic with a flow policy as the actor (`algo=sac_*`), docs/algorithms/sac.md.

    train stage    actor: flow matching on demonstrations        critic: chunked backup, warming up on them
    online stage   actor: α log p − Q + λ‖a − a_ref‖² (same noise)   critic: the same   temperature: entropy target
                   and β · flow matching on accepted chunks, in every step

The learner calls `forward(batch, step)` with a LearningBatch. In the online stage the values' prefixes are
encoded once, without gradient, and serve flow and critic alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

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
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.agents.flow_path import FlowPath, NoiseScale, path_entropy, sample_path
from serl_launcher.critics.ensemble import ChunkCritic, track
from serl_launcher.critics.losses import cal_ql, pessimistic, td_loss
from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix, trainable
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch

BEYOND = 1e6
"""Model units far outside any robot's limits."""


class SACAgent(FlowAgent):
    """Flow actor, ensemble critic, temperature.

    policy: the flow policy that is trained and served. feature_dim: of `policy.features`. horizon: executed ticks of a
    chunk. flow_steps: K of the stochastic sampler. tau: rate of the target critics. target_members: critics in the
    target's minimum. warmup_steps: critic steps of the online stage before the actor moves. actor_period: critic steps
    per actor step. behaviour_weight: λ. normalise_q: divide Q by its mean size in the actor's loss, so that λ and α
    mean the same on every task (TD3+BC). imitation_weight: of flow matching on accepted chunks in every online step,
    backbone included. target_std: the σ at which the path entropy has its target. backup_entropy: subtract α log p in
    the target. cal_ql_weight: 0 leaves the term out. return_bound: what an episode went on to bring is the least that a
    target may be (`TransitionBatch.floor`). q_limit: |Q| beyond it stops training.
    """

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
        actor_period: int = 2,
        behaviour_weight: float = 1.0,
        normalise_q: bool = True,
        imitation_weight: float = 0.0,
        noise_samples: int = 4,
        squash: bool = False,
        init_std: float = 0.1,
        min_std: float = 0.01,
        max_std: float = 0.5,
        target_std: float = 0.08,
        init_temperature: float = 1e-3,
        backup_entropy: bool = False,
        cal_ql_weight: float = 0.0,
        cal_ql_samples: int = 2,
        return_bound: bool = False,
        q_limit: float = 1e3,
    ) -> None:
        super().__init__()
        check_horizon(horizon, policy)
        check_members(target_members, critics)
        self.policy, self.prompt, self.horizon = policy, prompt, horizon
        if squash:
            self._check_squash()
        self.flow_steps, self.squash = flow_steps, squash
        self.tau, self.target_members = tau, target_members
        self.warmup_steps, self.actor_period = warmup_steps, actor_period
        self.behaviour_weight, self.normalise_q = behaviour_weight, normalise_q
        self.imitation_weight, self.noise_samples = imitation_weight, noise_samples
        self.backup_entropy, self.q_limit = backup_entropy, q_limit
        self.cal_ql_weight, self.cal_ql_samples = cal_ql_weight, cal_ql_samples
        self.return_bound = return_bound
        self.critic = ChunkCritic(feature_dim, horizon, policy.robot_dim, critics, widths)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.noise_scale = NoiseScale(feature_dim, flow_steps, policy.robot_dim, init_std, min_std, max_std)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(init_temperature)))
        dims = policy.action_horizon * policy.robot_dim
        self.target_entropy = path_entropy(flow_steps, dims, target_std)
        self._mode = "train"
        # Where the online stage began; empty before. One tensor a trainable one, on the same device.
        self._reference = {name: p.detach().clone() for name, p in trainable(policy).items()}
        self.register_buffer("online_steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """`.to(device)` and the like reach the reference, which is no parameter of this module."""
        super()._apply(fn, recurse)
        self._reference = {name: fn(p) for name, p in self._reference.items()}
        return self

    def _check_squash(self) -> None:
        low, high = self._limits()
        if not (torch.allclose(low, -torch.ones_like(low)) and torch.allclose(high, torch.ones_like(high))):
            raise ValueError(
                "algo.agent.squash: tanh ends at ±1, but in this policy's units the task's limits lie at "
                f"{[round(x, 2) for x in low.tolist()]} and {[round(x, 2) for x in high.tolist()]}; "
                "take algo.agent.squash=false"
            )

    def _limits(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest action in the model's units: float32[robot dims] each."""
        device = next(self.policy.parameters()).device
        wide = torch.full((1, self.horizon, self.policy.robot_dim), BEYOND, device=device)
        return self.sent(-wide)[0, 0], self.sent(wide)[0, 0]

    # What the learner needs.

    def groups(self) -> dict[str, ParameterGroup]:
        noise = {f"noise_scale.{name}": p for name, p in self.noise_scale.named_parameters()}
        return {
            "actor": ParameterGroup(trainable(self.policy) | noise),
            "critic": ParameterGroup({f"critic.{n}": p for n, p in self.critic.named_parameters()}, scheduled=False),
            "temperature": ParameterGroup({"log_alpha": self.log_alpha}, scheduled=False),
        }

    def trainable_state(self) -> dict[str, Tensor]:
        return trainable(self.policy)

    def carried(self) -> dict[str, Tensor]:
        target = {f"target.{name}": p.detach() for name, p in self.target.named_parameters()}
        return target | {f"reference.{n}": p for n, p in self._reference.items()} | {"online_steps": self.online_steps}

    @torch.no_grad()
    def begin_stage(self, mode: str) -> None:
        """The policy with which the first online stage begins is the reference ever after."""
        self._mode = mode
        if mode == "online" and self.online_steps == 0:
            for name, p in trainable(self.policy).items():
                self._reference[name] = p.detach().clone()

    def after_step(self) -> None:
        track(self.target, self.critic, self.tau)
        if self._mode == "online":
            self.online_steps += 1

    # Losses.

    def forward(self, batch: LearningBatch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of `actor`, `critic`, `temperature` (those whose turn it is), and metrics."""
        transitions = batch.transitions
        prefix = self.observe(transitions.images, transitions.state)
        critic_loss, metrics = self.critic_loss(transitions, prefix)
        losses = {"critic": critic_loss}
        metrics["batch/transition_demo_share"] = torch.as_tensor(transitions.demo).float().mean()
        imitate = self._mode == "train" or (self.imitation_weight and batch.imitation is not None)
        if imitate:
            flow, more = imitation_loss(self.policy, self.prompt, batch.imitation, self.noise_samples)
            losses["actor"] = flow if self._mode == "train" else self.imitation_weight * flow
            metrics |= more
        if self._improves():
            noise, step_noise = self.draw(len(transitions), prefix)
            reference = self.reference_prefix(transitions) if self.behaviour_weight else None
            value, losses["temperature"], more = self.actor_loss(prefix, noise, step_noise, reference)
            losses["actor"] = losses["actor"] + value if imitate else value
            metrics |= more
        return losses, metrics

    def _improves(self) -> bool:
        """Is it the turn of the actor's own loss?"""
        if self._mode != "online" or self.online_steps < self.warmup_steps:
            return False
        return int(self.online_steps) % self.actor_period == 0

    def draw(self, b: int, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """x_0 float32[b, ah, ad] and the noise of the steps float32[K, b, ah, ad]."""
        shape = (b, self.policy.action_horizon, self.policy.action_dim)
        device = prefix.state.device
        return torch.randn(shape, device=device), torch.randn((self.flow_steps, *shape), device=device)

    def path(self, prefix: Prefix, noise: Tensor, step_noise: Tensor, log_std: Tensor) -> FlowPath:
        """The actor's stochastic path from this noise."""
        return sample_path(
            lambda x, t: self.policy.velocity(prefix, x, t), noise, step_noise, log_std, self._robot_dim, self.squash
        )

    @torch.no_grad()
    def reference_prefix(self, batch: TransitionBatch) -> Prefix:
        """What the backbone said of these observations when the online stage began; imitation trains it, too."""
        observation = PolicyInput(batch.images, batch.state, [self.prompt] * len(batch))
        return self._by_reference("encode", observation)

    @torch.no_grad()
    def reference_path(self, prefix: Prefix, noise: Tensor, step_noise: Tensor, log_std: Tensor) -> FlowPath:
        """The path of the policy with which the online stage began, from its own prefix and the same noises."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self._by_reference("velocity", prefix, x, t)

        return sample_path(velocity, noise, step_noise, log_std, self._robot_dim, self.squash)

    def _by_reference(self, method: str, *args: Any) -> Any:
        tensors = {f"policy.{name}": p for name, p in self._reference.items()}
        return functional_call(_Method(self.policy, method), tensors, args)

    def critic_loss(self, batch: TransitionBatch, prefix: Prefix) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error to the chunked backup, and Cal-QL when asked for."""
        device = prefix.state.device
        with torch.no_grad():
            target = self.backup(batch)
        features = self.policy.features(prefix)
        chunk, is_pad = self.labels(batch.action, device), torch.as_tensor(batch.is_pad, device=device)
        q = self.critic(features, chunk, is_pad)
        check_values(q, self.q_limit)
        loss = td_loss(q, target)
        metrics = critic_metrics(loss, q, target, batch.bootstrap)
        if self.cal_ql_weight:
            gap = self.conservative_gap(batch, prefix, features, q)
            loss = loss + self.cal_ql_weight * gap
            metrics["losses/cal_ql"] = gap.detach()
        return loss, metrics

    def backup(self, batch: TransitionBatch) -> Tensor:
        """y of each transition: float32[b], without gradient."""
        prefix = self.observe(batch.next_images, batch.next_state)
        features = self.policy.features(prefix)
        path = self.path(prefix, *self.draw(len(batch), prefix), self.noise_scale(features))
        value = pessimistic(self.target(features, self.executed(path.chunk)), self.target_members)
        if self.backup_entropy:
            value = value - self.log_alpha.exp() * path.log_prob
        return self.target_of(batch, value)

    def conservative_gap(self, batch: TransitionBatch, prefix: Prefix, features: Tensor, q: Tensor) -> Tensor:
        """Cal-QL's term over `cal_ql_samples` chunks of the policy and as many uniform ones within the limits."""
        m, b, device = self.cal_ql_samples, len(batch), features.device
        with torch.no_grad():
            repeated = prefix.repeat(m)
            log_std = self.noise_scale(features.repeat_interleave(m, 0))
            chunk = self.executed(self.path(repeated, *self.draw(b * m, repeated), log_std).chunk)
            low, high = self._limits()
            random = low + (high - low) * torch.rand_like(chunk)
        wide = features.repeat_interleave(m, 0)
        by_policy, by_chance = (self.critic(wide, c).view(-1, b, m) for c in (chunk, random))
        return cal_ql(q, by_policy, by_chance, torch.as_tensor(batch.to_go, device=device))

    def actor_loss(
        self, prefix: Prefix, noise: Tensor, step_noise: Tensor, reference_prefix: Prefix | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """mean(α log p − Q/|Q| + λ‖a − a_ref‖²), the temperature's loss, and metrics.

        reference_prefix: None where the backbone has not moved since the online stage began.
        """
        features = self.policy.features(prefix)
        log_std = self.noise_scale(features)
        path = self.path(prefix, noise, step_noise, log_std)
        q = functional_call(self.critic, frozen_copy(self.critic), (features, self.executed(path.chunk))).mean(0)
        size = q.detach().abs().mean().clamp(min=1e-6) if self.normalise_q else torch.ones(())
        alpha = self.log_alpha.exp()
        loss = (alpha.detach() * path.log_prob - q / size).mean()
        metrics = {}
        if self.behaviour_weight:
            own = prefix if reference_prefix is None else reference_prefix
            reference = self.reference_path(own, noise, step_noise, log_std.detach())
            drift = (path.chunk - reference.chunk)[..., : self._robot_dim].square().mean()
            loss = loss + self.behaviour_weight * drift
            metrics["actor/drift"] = drift.detach()
        surplus = (-path.log_prob - self.target_entropy).detach().mean()
        metrics |= {
            "losses/actor": loss.detach(),
            "actor/q": q.detach().mean(),
            "actor/entropy_surplus": surplus,
            "actor/temperature": alpha.detach(),
            "actor/std": log_std.detach().exp().mean(),
        }
        # Too little entropy (surplus < 0) raises α.
        return loss, self.log_alpha * surplus, metrics

    @property
    def _robot_dim(self) -> int:
        return self.policy.robot_dim


class _Method(nn.Module):
    """A policy's method as a module's forward, for functional_call."""

    def __init__(self, policy: FlowPolicy, method: str) -> None:
        super().__init__()
        self.policy, self._method = policy, method

    def forward(self, *args: Any) -> Any:
        return getattr(self.policy, self._method)(*args)
