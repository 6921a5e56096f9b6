"""Flow-matching imitation of accepted ticks: the loss of `reject_sampling_*` and of `sft_*`.

The learner calls `forward(batch, step)`; what differs between the two algorithms is the acceptance rule that filled
the view, not the loss. All flow times are supervised (Hi-ORS, arXiv 2510.26406, section on intermediate steps).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from serl_launcher.agents import shares
from serl_launcher.agents.base import ParameterGroup
from serl_launcher.agents.observations import observation, on_device
from serl_launcher.policies.base import FlowPolicy, Prefix, flow_loss, for_samples, trainable
from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.views import ChunkBatch
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, kw_only=True)
class FlowMatchingSettings:
    """`algo.agent` of reject_sampling_* and sft_*; config/algo/reject_sampling_pi0.yaml has the values."""

    noise_samples: int  # noises and flow times for each encoded observation

    def build(self, policy: FlowPolicy, task: TaskSpec, horizon: int) -> "FlowMatchingAgent":
        return FlowMatchingAgent(policy, self.noise_samples)


class FlowMatchingAgent(nn.Module):
    """E[ w · ‖v_θ(x_t, t, s) − (a − ε)‖² ] over accepted ticks, several (ε, t) per encoded observation."""

    def __init__(self, policy: FlowPolicy, noise_samples: int) -> None:
        super().__init__()
        self.policy = policy
        self.noise_samples = noise_samples

    def forward(self, batch: ChunkBatch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of the one group, `policy`, and metrics for the log (detached scalars)."""
        loss, metrics = imitation_loss(self.policy, batch, self.noise_samples)
        return {"policy": loss}, metrics

    def prepare(self, batch: ChunkBatch) -> ChunkBatch:
        """On the device, where it is such a batch."""
        return on_device(self.policy, batch) if isinstance(batch, ChunkBatch) else batch

    def groups(self) -> dict[str, ParameterGroup]:
        return {"policy": ParameterGroup(trainable(self.policy))}

    def begin_stage(self, mode: str) -> None:
        """The loss is the same in every stage."""

    def forget_data(self) -> None:
        """Nothing of a batch is kept."""

    def after_step(self, taken: Tensor) -> None:
        """There is no target network to move."""

    def trainable_state(self) -> dict[str, Tensor]:
        return trainable(self.policy)

    def auxiliary_state(self) -> dict[str, Tensor]:
        """The policy is all there is."""
        return {}


def imitation_loss(
    policy: FlowPolicy, batch: ChunkBatch, noise_samples: int, weigh: Callable[[Prefix], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The flow-matching loss of a batch of accepted chunks, a scalar with gradient, and metrics.

    weigh: a further weight of each chunk, float32[b], from its prefix, whose features may be asked for.
    """
    k, b = noise_samples, len(batch)
    prefix = policy.encode(observation(batch), features=weigh is not None)
    device = prefix.state.device
    chunk = policy.normalise_actions(to_device(batch.action, device), prefix.anchor).repeat_interleave(k, 0)
    encoded, prefix = prefix, for_samples(policy, prefix, k)
    is_pad = to_device(batch.is_pad, device).repeat_interleave(k, 0)
    weight = to_device(batch.weight, device)
    weight = (weight if weigh is None else weight * weigh(encoded)).repeat_interleave(k, 0)
    noise, t = shares.normal(chunk.shape, device), shares.times(b * k, device)
    per_sample = flow_loss(policy, prefix, chunk, is_pad, weight, noise, t)
    demo = to_device(batch.demo, device).repeat_interleave(k, 0)
    metrics = {
        "losses/flow": per_sample.mean().detach(),
        "batch/demo_share": demo.float().mean(),
        "batch/operator_share": to_device(batch.operator, device).float().mean(),
        "batch/pad_share": is_pad.float().mean(),
    }
    return per_sample.mean(), metrics
