"""What the agents that learn values share: the settings, an ensemble of critics with its target, and the backup.

agents.implicit_q, agents.sac and agents.dsrl extend `ValueSettings` and `ValueAgent`, the last two by a temperature
(`EntropySettings`); batches are of replay.learning.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.agents.base import Limit, follow
from serl_launcher.agents.encoded import Encoded
from serl_launcher.agents.observations import on_device
from serl_launcher.critics.ensemble import ChunkCritic
from serl_launcher.critics.losses import chunk_target
from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix, trainable
from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """Settings of every agent that learns values; config/algo/_values.yaml has the values."""

    flow_steps: int  # K, Euler steps of the flow where a chunk is sampled for a critic
    noise_samples: int  # noises and flow times for each encoded observation, in imitation
    critics: int  # members of the ensemble
    widths: Sequence[int]  # hidden layers of a critic, units each
    tau: float  # rate at which the target critics follow, share per step
    target_members: int  # critics in the target's minimum, drawn anew each step (REDQ)
    warmup_steps: int  # critic steps of the online stage before the actor moves, or before it chooses
    return_bound: bool  # is a target at least the return that followed in the episode (1611.01606)?
    q_limit: float  # |Q| beyond it stops training, in units of the return


@dataclass(frozen=True, kw_only=True)
class EntropySettings(ValueSettings):
    """Settings of the agents with a temperature."""

    init_temperature: float  # α to begin with, return per nat of entropy


class ValueAgent(nn.Module):
    """A flow policy beside an ensemble of critics and its target, and a temperature where the settings have one.

    horizon: ticks of a chunk that are executed, what a critic sees. feature_dim: of `policy.features`. critic: one that
    is there already, as a part of the policy. ValueError: the settings do not fit each other or the policy.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        settings: ValueSettings,
        *,
        feature_dim: int,
        horizon: int,
        critic: ChunkCritic | None = None,
    ) -> None:
        super().__init__()
        _check(settings, horizon, policy.action_horizon)
        self.policy, self.settings, self.horizon = policy, settings, horizon
        widths = settings.widths
        self.critic = critic or ChunkCritic(feature_dim, horizon, policy.robot_dim, settings.critics, widths)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        if isinstance(settings, EntropySettings):
            self.log_alpha = nn.Parameter(torch.tensor(math.log(settings.init_temperature)))
        self.online = False  # is the stage an online one?
        self.online_steps = torch.zeros((), dtype=torch.int64)  # on the host, who decides by it; refused ones count

    def begin_stage(self, mode: str) -> None:
        self.online = mode == "online"

    def forget_data(self) -> None:
        """Nothing of a batch is kept."""

    def after_step(self, taken: Tensor) -> None:
        """The target critics follow, and online steps are counted."""
        follow(self.target.parameters(), self.critic.parameters(), self.settings.tau * taken)
        if self.online:
            self.online_steps += 1

    def trainable_state(self) -> dict[str, Tensor]:
        return trainable(self.policy)

    def auxiliary_state(self) -> dict[str, Tensor]:
        target = {name: p.detach() for name, p in self.target.named_parameters("target")}
        return target | {"online_steps": self.online_steps}

    @property
    def warm(self) -> bool:
        """Has the critic learned long enough online for the actor to follow it?"""
        return self.online and int(self.online_steps) >= self.settings.warmup_steps

    def prepare(self, batch: LearningBatch) -> LearningBatch:
        """On the device, where it is such a batch."""
        if not isinstance(batch, LearningBatch):
            return batch
        imitation = batch.imitation and on_device(self.policy, batch.imitation)
        return LearningBatch(imitation, on_device(self.policy, batch.transitions))

    @torch.no_grad()
    def observe(self, of: PolicyInput) -> Prefix:
        """The prefix of a batch of observations, without gradient."""
        return self.policy.encode(of)

    def executed(self, chunk: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The ticks and dims of a sampled chunk that reach the robot, as `sent`: float32[b, h, robot dims]. anchor: of
        its prefix.

        The gradient passes the clip, or an action beyond the limit could never come back.
        """
        part = chunk[:, : self.horizon, : self.policy.robot_dim]
        return part + (self.sent(part, anchor) - part).detach()

    @torch.no_grad()
    def sent(self, chunk: Tensor, anchor: Tensor | None = None) -> Tensor:
        """What the robot is sent for a chunk, both in the model's units: float32[..., robot dims].

        The limits are the task's; only units that span the task's ranges have them at ±1.
        """
        physical = self.policy.physical_actions(chunk, anchor)
        return self.policy.normalise_actions(physical, anchor)[..., : self.policy.robot_dim]

    def labels(self, action: np.ndarray | Tensor, device: torch.device, anchor: Tensor | None = None) -> Tensor:
        """Executed physical actions in the model's units: float32[b, h, robot dims]. anchor: of the observation that
        they begin at."""
        chunk = self.policy.normalise_actions(to_device(action, device), anchor)
        return chunk[..., : self.policy.robot_dim]

    def target_of(self, batch: TransitionBatch | Encoded, next_value: Tensor) -> Tensor:
        """The chunked backup of each transition from its next state's value float32[b]: float32[b]."""
        device = next_value.device
        reward, discount, bootstrap, lower_bound = (
            to_device(x, device) for x in (batch.reward, batch.discount, batch.bootstrap, batch.value_lower_bound)
        )
        target = chunk_target(reward, discount, bootstrap, next_value)
        return torch.maximum(target, lower_bound) if self.settings.return_bound else target

    @property
    def limits(self) -> dict[str, Limit]:
        """No |Q| may pass `q_limit`."""
        told = f"the critic diverges: |Q| = {{:.3g}}, beyond q_limit {self.settings.q_limit:g} (lower the critic's "
        told += "learning rate, or raise q_limit where returns are that large)"
        return {"critic/q_size": Limit(self.settings.q_limit, told)}


def frozen_copy(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters without gradient, for torch.func.functional_call."""
    return {name: p.detach() for name, p in module.named_parameters()}


def critic_metrics(loss: Tensor, q: Tensor, target: Tensor, bootstrap: np.ndarray | Tensor) -> dict[str, Tensor]:
    """What every agent logs of its critic. q float32[e, b], target float32[b], bootstrap bool[b]."""
    q = q.detach()
    return {
        "losses/critic": loss.detach(),
        "critic/q": q.mean(),
        "critic/q_max": q.max(),
        "critic/q_size": q.abs().max(),
        "critic/target": target.mean(),
        "critic/spread": q.std(dim=0).mean() if len(q) > 1 else torch.zeros(()),
        "batch/terminal_share": 1 - torch.as_tensor(bootstrap).float().mean(),
    }


def _check(settings: ValueSettings, horizon: int, longest: int) -> None:
    """A critic judges executed ticks; the target's minimum is over some of the critics."""
    if not 1 <= horizon <= longest:
        raise ValueError(f"rollout.execute_horizon: expected 1 to action_horizon {longest}, got {horizon}")
    members, critics = settings.target_members, settings.critics
    if not 1 <= members <= critics:
        raise ValueError(f"algo.agent.target_members: expected 1 to algo.agent.critics {critics}, got {members}")
