"""What an agent is to the learner: named losses over named parameter groups.

The learner (learner.learner) owns one optimizer a group; an agent owns losses, targets and what is published. One
forward, one backward: an agent keeps its losses apart by detaching, so that each group receives the gradient of its
own loss alone and distributed wrappers see a single backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.agents.encoded import Encoded
from serl_launcher.critics.losses import chunk_target
from serl_launcher.policies.base import FlowPolicy, PolicyInput
from serl_launcher.replay.transitions import TransitionBatch


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that one optimizer moves."""

    tensors: dict[str, nn.Parameter]  # name -> parameter; names are unique within the agent
    scheduled: bool = True  # does the stage's learning-rate schedule apply (values are learned at a constant rate)


class Agent(Protocol):
    """An algorithm; every implementation is an `nn.Module`."""

    def __call__(self, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by group (scalars; groups without one rest this step) and metrics for the log (detached scalars)."""
        ...

    def groups(self) -> dict[str, ParameterGroup]:
        """Group name -> what its optimizer moves."""
        ...

    def begin_stage(self, mode: str) -> None:
        """A stage of this mode (`train` or `online`) begins, or is resumed."""
        ...

    def after_step(self) -> None:
        """The optimizers have stepped: targets follow."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """What is published, and averaged."""
        ...

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the groups and `trainable_state`: targets, references, counters."""
        ...


class Diverged(FloatingPointError):  # noqa: N818  (an event that the trainer handles)
    """Values left every plausible range; the step must not be taken."""


class FlowAgent(nn.Module):
    """Shared by the agents that learn values: encodes observations, cuts the executed part out of a chunk."""

    policy: FlowPolicy
    prompt: str
    horizon: int  # ticks of a chunk that are executed, what a critic sees
    return_bound: bool  # is a target at least what the episode went on to bring (1611.01606)?

    def observe(self, images: dict[str, np.ndarray], state: np.ndarray):
        """The prefix of a batch of observations, without gradient."""
        with torch.no_grad():
            return self.policy.encode(PolicyInput(images, state, [self.prompt] * len(state)))

    def executed(self, chunk: Tensor) -> Tensor:
        """The ticks and dims of a sampled chunk that reach the robot, as `sent`: float32[b, h, robot dims].

        The gradient passes the clip, or an action beyond the limit could never come back.
        """
        part = chunk[:, : self.horizon, : self.policy.robot_dim]
        return part + (self.sent(part) - part).detach()

    @torch.no_grad()
    def sent(self, chunk: Tensor) -> Tensor:
        """What the robot is sent for a chunk, both in the model's units: float[..., robot dims].

        The limits are the task's; only units that span the task's ranges have them at ±1.
        """
        return self.policy.normalise_actions(self.policy.physical_actions(chunk))[..., : self.policy.robot_dim]

    def target_of(self, batch: TransitionBatch | Encoded, next_value: Tensor) -> Tensor:
        """The chunked backup of each transition from its next state's value float32[b]: float32[b]."""
        device = next_value.device
        reward, discount, bootstrap, floor = (
            torch.as_tensor(x, device=device) for x in (batch.reward, batch.discount, batch.bootstrap, batch.floor)
        )
        target = chunk_target(reward, discount, bootstrap, next_value)
        return torch.maximum(target, floor) if self.return_bound else target

    def labels(self, action: np.ndarray, device: torch.device) -> Tensor:
        """Executed physical actions in the model's units: float32[b, h, robot dims]."""
        chunk = self.policy.normalise_actions(torch.as_tensor(action, device=device))
        return chunk[..., : self.policy.robot_dim]


def critic_metrics(loss: Tensor, q: Tensor, target: Tensor, bootstrap: np.ndarray | Tensor) -> dict[str, Tensor]:
    """What every agent logs of its critic. q float32[e, b], target float32[b], bootstrap bool[b]."""
    q = q.detach()
    return {
        "losses/critic": loss.detach(),
        "critic/q": q.mean(),
        "critic/q_max": q.max(),
        "critic/target": target.mean(),
        "critic/spread": q.std(dim=0).mean() if len(q) > 1 else torch.zeros(()),
        "batch/terminal_share": 1 - torch.as_tensor(bootstrap).float().mean(),
    }


def check_horizon(horizon: int, policy: FlowPolicy) -> None:
    """A critic judges executed ticks; a chunk has no more of them than the policy makes. ValueError says so."""
    if not 1 <= horizon <= policy.action_horizon:
        longest = policy.action_horizon
        raise ValueError(f"rollout.execute_horizon: expected 1 to action_horizon {longest}, got {horizon}")


def check_members(members: int, critics: int) -> None:
    """The target's minimum is over some of the critics. ValueError says how many there are."""
    if not 1 <= members <= critics:
        raise ValueError(f"algo.agent.target_members: expected 1 to algo.agent.critics {critics}, got {members}")


def check_values(q: Tensor, limit: float) -> None:
    """Raise Diverged when any |Q| passes `limit` or is not a number."""
    worst = q.detach().abs().max().item()
    if not worst <= limit:
        raise Diverged(
            f"the critic diverges: |Q| = {worst:.3g}, beyond q_limit {limit:g}; "
            "lower the critic's learning rate, or raise q_limit where returns are that large"
        )


def frozen_copy(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters without gradient, for torch.func.functional_call."""
    return {name: p.detach() for name, p in module.named_parameters()}
