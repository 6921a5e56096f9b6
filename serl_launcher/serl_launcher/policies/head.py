"""What the heads share: units and limits of the task, the switches of the forward path, pooled features.

pi0.head and groot.head derive from it; what each method promises stands in policies.base.FlowPolicy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serl_launcher.policies.base import PolicyInput, Prefix
from serl_launcher.policies.compiling import check_switch
from serl_launcher.policies.normalise import Units, pad_last
from serl_launcher.policies.precision import check_precision
from serl_transport.contract.specs import TaskSpec


class FlowHead(nn.Module):
    """A flow policy over a library's module.

    Args:
        core: the library's module.
        spec: the task; its ranges are the units where `units` is None, its limits clip every chunk.
        cameras: the task's, in the order that the weights know.
        chunk: ticks and dims of the model's chunks.
        attention: `eager` calls the library's layers, `sdpa` ours (fused attention).
        checkpointing: one activation checkpoint a layer.
        precision: float32 or bfloat16 (policies.precision).
        compile: torch.compile of the layers, auto, on or off (policies.compiling).
        valid_horizon: ticks of a chunk that the checkpoint was trained on; None: all.
        clip: states and labels beyond the statistics' range are clipped, as the checkpoint was trained.
    """

    def __init__(
        self,
        core: nn.Module,
        spec: TaskSpec,
        cameras: tuple[str, ...],
        units: Units | None,
        chunk: tuple[int, int],
        *,
        attention: str,
        checkpointing: bool,
        precision: str,
        compile: str,
        valid_horizon: int | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"policy.attention: expected eager or sdpa, got {attention!r}")
        self.core, self.cameras = core, cameras
        self.action_horizon, self.action_dim = chunk
        self.robot_dim = len(spec.action_names)
        units = units or Units.from_spec(spec)
        self.state_units, self.action_units = units.state, units.action
        self.register_buffer("_low", torch.tensor(spec.action_low), persistent=False)
        self.register_buffer("_high", torch.tensor(spec.action_high), persistent=False)
        self.attention, self.checkpointing, self.precision = attention, checkpointing, check_precision(precision)
        self.valid_horizon, self.clip = valid_horizon or self.action_horizon, clip
        self.compile_layers(check_switch("policy.compile", compile))

    def compile_layers(self, mode: str, backend: str = "inductor") -> None:
        """Use torch.compile for the layers: auto, on or off (policies.compiling)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.state_units.offset.device

    def encode(self, observation: PolicyInput) -> Prefix:
        return self.encode_prepared(self.prepare(observation))

    def features(self, prefix: Prefix) -> Tensor:
        """Mean of the hidden states over the tokens that count, with the state beside it."""
        keep = prefix.pad_mask.unsqueeze(-1).to(prefix.hidden.dtype)
        return torch.cat([((prefix.hidden * keep).sum(1) / keep.sum(1)).float(), prefix.state], dim=-1)

    def normalise_actions(self, chunk: Tensor) -> Tensor:
        """Physical float32[..., robot dims] to the model's units, zeros in the dims that the robot lacks."""
        units = self.action_units.to_model(chunk)
        return pad_last(units.clamp(-1, 1) if self.clip else units, self.action_dim)

    def physical_actions(self, chunk: Tensor) -> Tensor:
        """The model's units to physical float32[..., valid horizon, robot dims], clipped to the task's limits."""
        chunk = chunk[..., : self.valid_horizon, : self.robot_dim]
        return self.action_units.to_physical(chunk.clamp(-1, 1) if self.clip else chunk).clamp(self._low, self._high)
