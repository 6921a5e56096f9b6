"""Soft actor-critic with a flow policy as the actor (`algo=sac_*`), docs/algorithms/sac.md.

    train stage    actor: flow matching on demonstrations        critic: chunked backup, warming up on them
    online stage   actor: α log p − Q + λ‖a − a_ref‖² (same noise)   critic: the same   temperature: entropy target
                   and β · flow matching on accepted chunks, in every step

The learner calls `forward(batch, step)` with a LearningBatch. In the online stage an observation is encoded once,
without gradient, for flow and critic alike. Formulas: agents.losses, critics.losses, agents.flow_path.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from serl_launcher.agents import shares
from serl_launcher.agents.base import ParameterGroup, feature_dim
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.agents.flow_path import FlowPath, NoiseScale, path_entropy, sample_path
from serl_launcher.agents.losses import behaviour_loss, entropy_surplus, mean_size, soft_actor_loss, temperature_loss
from serl_launcher.agents.observations import next_observation, observation
from serl_launcher.agents.reference import Reference
from serl_launcher.agents.values import EntropySettings, ValueAgent, critic_metrics, frozen_copy
from serl_launcher.critics.losses import cal_ql, pessimistic, td_loss
from serl_launcher.policies.base import FlowPolicy, Prefix, flow_times, trainable
from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch
from serl_transport.contract.specs import TaskSpec

Metrics = dict[str, Tensor]

BEYOND = 1e6
"""Model units far outside any robot's limits."""


@dataclass(frozen=True, kw_only=True)
class SACSettings(EntropySettings):
    """`algo.agent` of sac_*; config/algo/sac_pi0.yaml has the values. flow_steps is K of the stochastic sampler."""

    actor_period: int  # critic steps per actor step, once warm
    imitation_weight: float  # β, of flow matching on accepted chunks in every online step, backbone included
    behaviour_weight: float  # λ, of the squared distance to the policy that the online stage began with
    normalise_q: bool  # does Q enter the actor's loss in units of its mean size?
    squash: bool  # tanh at the end of the path; for policies in whose units the task's limits are ±1
    init_std: float  # σ of each flow step to begin with, model units
    min_std: float  # the least σ that is learned, model units
    max_std: float  # the largest, model units
    target_std: float  # the temperature holds the path's entropy at that of this constant σ, model units
    backup_entropy: bool  # is α log p subtracted in the critic's target?
    cal_ql_weight: float  # of Cal-QL's conservative term; 0 leaves it out
    cal_ql_samples: int  # chunks of the policy, and uniform ones, for each transition in that term

    def build(self, policy: FlowPolicy, task: TaskSpec, horizon: int) -> "SACAgent":
        unit = noise_unit(task, policy)
        return SACAgent(policy, self, feature_dim=feature_dim(policy, task), horizon=horizon, unit=unit)


def noise_unit(task: TaskSpec, policy: FlowPolicy | None = None) -> Tensor:
    """What the noise of each action dim is a share of, model units: float32[ad].

    A displacement's is 1, its limit. A target's is the share of its range that it moves in a tick: a whole range is
    where the robot may be, not how far it may go. A relative action's is that way in the policy's own unit, at most 1.
    """
    reach = (np.array(task.action_high) - np.array(task.action_low)) / 2
    low, high = task.full_moves()
    unit = torch.from_numpy((high - low) / 2 / reach).float()
    if policy is None or policy.anchors is None:
        return unit
    moved = torch.from_numpy((high - low) / 2).float() / policy.action_units.unit.cpu()
    relative = torch.tensor([anchor is not None for anchor in policy.anchors])
    return torch.where(relative, moved.clamp(1e-3, 1), unit)


class SACAgent(ValueAgent):
    """Flow actor, ensemble critic, temperature. unit: as of `NoiseScale`."""

    settings: SACSettings

    def __init__(
        self,
        policy: FlowPolicy,
        settings: SACSettings,
        *,
        feature_dim: int,
        horizon: int,
        unit: Tensor | None = None,
    ) -> None:
        super().__init__(policy, settings, feature_dim=feature_dim, horizon=horizon)
        if settings.squash:
            self._check_squash()
        if settings.cal_ql_weight and policy.poses:
            raise ValueError(
                "algo.agent.cal_ql_weight: its uniform chunks have no limits to lie within where actions are relative "
                "as poses; take algo.agent.cal_ql_weight=0"
            )
        self.noise_scale = NoiseScale(
            feature_dim,
            settings.flow_steps,
            policy.robot_dim,
            settings.init_std,
            settings.min_std,
            settings.max_std,
            unit,
        )
        dims = policy.action_horizon * policy.robot_dim
        narrower = policy.action_horizon * settings.flow_steps * float(self.noise_scale.log_unit.sum())
        self.target_entropy = path_entropy(settings.flow_steps, dims, settings.target_std) + narrower
        self.reference = Reference(policy)

    # Losses.

    def forward(self, batch: LearningBatch, step: int) -> tuple[dict[str, Tensor], Metrics]:
        """Losses of `actor`, `critic`, `temperature` (those whose turn it is), and metrics."""
        transitions = batch.transitions
        prefix = self.observe(observation(transitions))
        losses = {}
        losses["critic"], metrics = self.critic_loss(transitions, prefix)
        metrics["batch/transition_demo_share"] = torch.as_tensor(transitions.demo).float().mean()
        if self._imitates(batch):
            flow, more = imitation_loss(self.policy, batch.imitation, self.settings.noise_samples)
            losses["actor"] = self.settings.imitation_weight * flow if self.online else flow
            metrics |= more
        if self._improves():
            noise, step_noise = self.draw(len(transitions), prefix)
            reference_prefix = self.reference_prefix(transitions) if self.settings.behaviour_weight else None
            value, losses["temperature"], more = self.actor_loss(prefix, noise, step_noise, reference_prefix)
            losses["actor"] = losses["actor"] + value if "actor" in losses else value
            metrics |= more
        return losses, metrics

    def critic_loss(self, batch: TransitionBatch, prefix: Prefix) -> tuple[Tensor, Metrics]:
        """Squared error to the chunked backup, and Cal-QL when asked for."""
        device = prefix.state.device
        with torch.no_grad():
            target = self.backup(batch)
        features = self.policy.features(prefix)
        labels = self.labels(batch.action, device, prefix.anchor)
        q = self.critic(features, labels, to_device(batch.is_pad, device))
        loss = td_loss(q, target)
        metrics = critic_metrics(loss, q, target, batch.bootstrap)
        if self.settings.cal_ql_weight:
            gap = self.conservative_gap(batch, prefix, features, q)
            loss = loss + self.settings.cal_ql_weight * gap
            metrics["losses/cal_ql"] = gap.detach()
        return loss, metrics

    def backup(self, batch: TransitionBatch) -> Tensor:
        """y of each transition: float32[b], without gradient."""
        prefix = self.observe(next_observation(batch))
        features = self.policy.features(prefix)
        path = self.path(prefix, *self.draw(len(batch), prefix), self.noise_scale(features))
        value = pessimistic(
            self.target(features, self.executed(path.chunk, prefix.anchor)), self.settings.target_members
        )
        if self.settings.backup_entropy:
            value = value - self.log_alpha.exp() * path.log_prob
        return self.target_of(batch, value)

    def conservative_gap(self, batch: TransitionBatch, prefix: Prefix, features: Tensor, q: Tensor) -> Tensor:
        """Cal-QL's term over `cal_ql_samples` chunks of the policy and as many uniform ones within the limits."""
        m, b, device = self.settings.cal_ql_samples, len(batch), features.device
        wide = features.repeat_interleave(m, 0)
        with torch.no_grad():
            anchor = None if prefix.anchor is None else prefix.anchor.repeat_interleave(m, 0)
            path = self.path(prefix, *self.draw(b * m, prefix), self.noise_scale(wide))
            chunk = self.executed(path.chunk, anchor)
            low, high = self._limits(anchor)
            random = low + (high - low) * shares.uniform(chunk.shape, device)
        by_policy, by_chance = (self.critic(wide, c).view(-1, b, m) for c in (chunk, random))
        return cal_ql(q, by_policy, by_chance, to_device(batch.return_to_go, device))

    def actor_loss(
        self, prefix: Prefix, noise: Tensor, step_noise: Tensor, reference_prefix: Prefix | None = None
    ) -> tuple[Tensor, Tensor, Metrics]:
        """mean(α log p − Q/|Q| + λ‖a − a_ref‖²), the temperature's loss, and metrics.

        reference_prefix: None where the backbone has not moved since the online stage began.
        """
        features = self.policy.features(prefix)
        log_std = self.noise_scale(features)
        drawn = (noise, step_noise, log_std)
        own = prefix if reference_prefix is None else reference_prefix
        # Before the path that is differentiated: a path without gradient may write into the prefix's room.
        reference = self.reference_path(own, *drawn) if self.settings.behaviour_weight else None
        path = self.path(prefix, *drawn)
        executed = self.executed(path.chunk, prefix.anchor)
        q = functional_call(self.critic, frozen_copy(self.critic), (features, executed)).mean(0)
        alpha = self.log_alpha.exp()
        loss = soft_actor_loss(path.log_prob, q / mean_size(q) if self.settings.normalise_q else q, alpha)
        metrics = {}
        if reference is not None:
            drift = behaviour_loss(self._robot_dims(path.chunk), self._robot_dims(reference.chunk))
            loss = loss + self.settings.behaviour_weight * drift
            metrics["actor/drift"] = drift.detach()
        surplus = entropy_surplus(path.log_prob, self.target_entropy)
        metrics |= {
            "losses/actor": loss.detach(),
            "actor/q": q.detach().mean(),
            "actor/entropy_surplus": surplus,
            "actor/temperature": alpha.detach(),
            "actor/std": log_std.detach().exp().mean(),
        }
        return loss, temperature_loss(self.log_alpha, surplus), metrics

    # Sampling.

    def draw(self, b: int, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """x_0 float32[b, ah, ad] and the noise of the steps float32[K, b, ah, ad]."""
        shape = (b, self.policy.action_horizon, self.policy.action_dim)
        device = prefix.state.device
        return shares.normal(shape, device), shares.normal((self.settings.flow_steps, *shape), device, axis=1)

    def path(self, prefix: Prefix, noise: Tensor, step_noise: Tensor, log_std: Tensor) -> FlowPath:
        """The actor's stochastic path from this noise, whose rows may be several for each of the prefix's."""
        return self._path_of(self.policy, prefix, noise, step_noise, log_std)

    @torch.no_grad()
    def reference_path(self, prefix: Prefix, noise: Tensor, step_noise: Tensor, log_std: Tensor) -> FlowPath:
        """The path of the policy with which the online stage began, from its own prefix and the same noises."""
        return self._path_of(self.reference, prefix, noise, step_noise, log_std)

    def reference_prefix(self, batch: TransitionBatch) -> Prefix:
        """What the backbone said of these observations when the online stage began; imitation trains it, too."""
        return self.reference.encode(observation(batch))

    def _path_of(
        self, flow: FlowPolicy | Reference, prefix: Prefix, noise: Tensor, step_noise: Tensor, log_std: Tensor
    ) -> FlowPath:
        ready = flow.ready(prefix, flow_times(len(step_noise), noise.device), len(noise) // len(prefix))
        velocity = partial(flow.velocity_at, ready)
        return sample_path(velocity, noise, step_noise, log_std, self.policy.robot_dim, self.settings.squash)

    def _robot_dims(self, chunk: Tensor) -> Tensor:
        """The robot's dims of a chunk."""
        return chunk[..., : self.policy.robot_dim]

    # Whose turn it is.

    def _imitates(self, batch: LearningBatch) -> bool:
        """Always in a train stage; online with β > 0, once something is accepted."""
        return not self.online or bool(self.settings.imitation_weight and batch.imitation is not None)

    def _improves(self) -> bool:
        """Every `actor_period`-th step of an online stage whose critic is warm."""
        return self.warm and int(self.online_steps) % self.settings.actor_period == 0

    # What the learner needs.

    def groups(self) -> dict[str, ParameterGroup]:
        return {
            "actor": ParameterGroup(trainable(self.policy) | dict(self.noise_scale.named_parameters("noise_scale"))),
            "critic": ParameterGroup(dict(self.critic.named_parameters("critic")), scheduled=False),
            "temperature": ParameterGroup({"log_alpha": self.log_alpha}, scheduled=False),
        }

    def auxiliary_state(self) -> dict[str, Tensor]:
        return super().auxiliary_state() | {f"reference.{name}": p for name, p in self.reference.tensors.items()}

    def begin_stage(self, mode: str) -> None:
        """The policy with which the first online stage begins is the reference ever after."""
        super().begin_stage(mode)
        if self.online and int(self.online_steps) == 0:
            self.reference.take()

    def _apply(self, fn, recurse: bool = True):
        """`.to(device)` and the like reach the reference, which is no parameter of this module."""
        super()._apply(fn, recurse)
        self.reference.convert(fn)
        return self

    # Limits.

    def _check_squash(self) -> None:
        if self.policy.anchors is not None:
            raise ValueError(
                "algo.agent.squash: tanh ends at ±1, but this policy's actions are relative to the state, with which "
                "the limits move; take algo.agent.squash=false"
            )
        low, high = (end[0, 0] for end in self._limits(None))
        if not (torch.allclose(low, -torch.ones_like(low)) and torch.allclose(high, torch.ones_like(high))):
            raise ValueError(
                "algo.agent.squash: tanh ends at ±1, but in this policy's units the task's limits lie at "
                f"{[round(x, 2) for x in low.tolist()]} and {[round(x, 2) for x in high.tolist()]}; "
                "take algo.agent.squash=false"
            )

    def _limits(self, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
        """The lowest and the highest chunk in the model's units: float32[b or 1, h, robot dims] each."""
        device = next(self.policy.parameters()).device
        rows = 1 if anchor is None else len(anchor)
        wide = torch.full((rows, self.horizon, self.policy.robot_dim), BEYOND, device=device)
        return self.sent(-wide, anchor), self.sent(wide, anchor)
