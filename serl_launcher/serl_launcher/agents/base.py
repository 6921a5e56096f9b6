"""The contract of an algorithm: its settings, which build its agent, and the agent's named losses.

    config/algo/<name>.yaml ── algo.agent ──▶ AgentSettings.build ──▶ Agent ──losses by group──▶ learner.learner

The learner owns one optimizer a group; an agent owns losses, targets and what is published. One forward, one backward:
an agent keeps its losses apart by detaching, so that each group receives the gradient of its own loss alone and
distributed wrappers see a single backward. docs/algorithms/your_own.md adds one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.base import FlowPolicy, PolicyInput
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that one optimizer moves."""

    tensors: dict[str, nn.Parameter]  # name -> parameter; names are unique within the agent
    scheduled: bool = True  # does the stage's learning-rate schedule apply (values are learned at a constant rate)


class Agent(Protocol):
    """An algorithm; every implementation is an `nn.Module`.

    `limits`, where it has such an attribute, are metrics of `forward` that keep a step from being taken, by name.
    `prepare(batch)`, where it has that, returns the batch with all made that depends on no parameter that trains; it is
    called in another thread, while the step before runs.
    """

    def __call__(self, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by group (scalars; a group without one is not moved in this step) and metrics (detached scalars)."""
        ...

    def groups(self) -> dict[str, ParameterGroup]:
        """Group name -> what its optimizer moves."""
        ...

    def begin_stage(self, mode: str) -> None:
        """A stage of this mode (`train` or `online`) begins, or is resumed."""
        ...

    def forget_data(self) -> None:
        """What people said of episodes has changed: drop what was kept of earlier batches."""
        ...

    def after_step(self, taken: Tensor) -> None:
        """Called behind the optimizers; target networks are moved here. taken: 1, or 0 where the device refused the
        step and nothing may change: a float32 scalar there, to multiply a rate by; whoever reads it makes the host
        wait for the device."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """The policy's parameters that are trained, by name: what is averaged, published and served."""
        ...

    def auxiliary_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the groups and `trainable_state`: target networks, references, counters.

        A checkpoint is loaded by copying into these tensors.
        """
        ...


class AgentSettings(Protocol):
    """What `algo.agent` names: a frozen dataclass, a field each key of the yaml. The values are in the yaml alone."""

    def build(self, policy: FlowPolicy, task: TaskSpec, horizon: int) -> Agent:
        """The agent that trains `policy`. horizon: ticks of a chunk that the actor executes before it asks again."""
        ...


@dataclass(frozen=True, slots=True)
class Limit:
    """Of a metric: a step in which it is larger, or no number, is refused."""

    most: float
    told: str  # what that means and what mends it, for people; {} is the value


@torch.no_grad()
def follow(targets: Iterable[Tensor], sources: Iterable[Tensor], rate: Tensor) -> None:
    """θ̄ ← (1 − τ) θ̄ + τ θ in place, for targets and averages; rate: τ, float32 scalar on the device, 0 for nothing."""
    targets = list(targets)
    torch._foreach_lerp_(targets, list(sources), [rate] * len(targets))


@torch.no_grad()
def feature_dim(policy: FlowPolicy, task: TaskSpec) -> int:
    """f of `policy.features`, asked with one blank observation."""
    images = {camera: np.zeros((1, h, w, 3), np.uint8) for camera, (h, w) in task.cameras.items()}
    state = np.zeros((1, len(task.state_names)), np.float32)
    return policy.features(policy.encode(PolicyInput(images, state, [task.prompt]))).shape[-1]
