"""The interface every policy head answers, and the tensors it takes.

Agents, the policy server and the local policy call it; heads (policies.pi0, ...) implement it over a library's
modules. One flow convention for all: t runs from 0 (noise) to 1 (action), x_t = t·a + (1 − t)·ε, v* = a − ε
(Lipman et al., 2210.02747). A head whose library runs time the other way converts inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.compiling import check_switch
from serl_launcher.policies.normalise import Units, pad_last
from serl_launcher.policies.poses import to_absolute, to_relative
from serl_launcher.policies.precision import check_precision
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class PolicyInput:
    """A batch of observations as the robot produced them; normalising and tokenising is the head's business."""

    images: dict[str, np.ndarray]  # camera -> uint8[b, h, w, 3]
    state: np.ndarray  # float32[b, s], physical units
    prompts: list[str]  # b language prompts
    prepared: Mapping[str, Tensor] | None = None  # what the policy's `prepare` made of it, where that was done before

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the backbone says of an observation: computed once, then read by every flow step, sample and critic."""

    keys_values: Any  # per layer that is attended to, a pair of float[b, heads, l, head_dim]; None: made when needed
    pad_mask: Tensor  # bool[b, l], True where a token counts
    hidden: Tensor | None  # float[b, l, width], last hidden states; None where encoded with features=False
    state: Tensor  # float32[b, s], normalised
    anchor: Tensor | None = field(default=None, kw_only=True)
    """float32[b, 1, robot dims], what the policy's actions are relative to, physical; None where all are absolute."""
    flow: Any = field(default=None, kw_only=True)
    """What all flow steps of a chunk share, made by `ready`: the head's own, or the times float32[steps] alone."""

    def __len__(self) -> int:
        return len(self.state)

    def repeat(self, n: int) -> Self:
        """The same prefix n times per sample (b -> b·n, samples of one observation adjacent), without re-encoding."""
        return self if n == 1 else self._each(lambda x: x.repeat_interleave(n, 0))

    def take(self, index: Tensor) -> Self:
        """The prefix of rows `index` int64[n], repeats allowed, without re-encoding."""
        if len(index) == len(self) and torch.equal(index, torch.arange(len(self), device=index.device)):
            return self
        return self._each(lambda x: x.index_select(0, index))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        if self.flow is not None:
            raise ValueError("prefix: rows are taken and repeated before it is made ready for the flow, not after")
        return replace(self, **{f.name: _changed(getattr(self, f.name), change) for f in fields(self)})


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if value is None or isinstance(value, Tensor):
        return None if value is None else change(value)
    return type(value)(_changed(item, change) for item in value)


class FlowPolicy(nn.Module):
    """A flow-matching policy head over a library's module `core`; a head adds what raises NotImplementedError here.

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

    action_horizon: int  # ah
    action_dim: int  # ad, dims of the model's chunks
    robot_dim: int  # the first of them that the robot has; the rest is padding of a wider checkpoint
    released_flow_steps: ClassVar[int]  # Euler steps that its release samples with
    shares_prefix: ClassVar[bool] = False  # may `velocity` be given fewer prefix rows than samples?

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
        self.anchors, self.poses = units.anchors, units.poses
        if self.anchors is not None:  # persistent: parameters fit only what they were trained relative to
            self.register_buffer("_anchor", torch.tensor([-1 if a is None else a for a in self.anchors]))
        if self.poses:
            self.register_buffer("_poses", torch.tensor(self.poses))
        self.register_buffer("_low", torch.tensor(spec.action_low), persistent=False)
        self.register_buffer("_high", torch.tensor(spec.action_high), persistent=False)
        self.attention, self.checkpointing, self.precision = attention, checkpointing, check_precision(precision)
        self.valid_horizon, self.clip = valid_horizon or self.action_horizon, clip
        self.compile_layers(check_switch("policy.compile", compile))

    @property
    def device(self) -> torch.device:
        return self.state_units.offset.device

    def compile_layers(self, mode: str, backend: str = "inductor") -> None:
        """Use torch.compile for the layers: auto, on or off."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """Those that `compiling.run_layer` runs: training may hold them in parts (policies.sharding). Here: none."""
        return []

    def read_outside(self) -> list[nn.Parameter]:
        """Parameters of `layers` that are read while their layer does not run."""
        return []

    def encode(self, observation: PolicyInput, features: bool = True) -> Prefix:
        """Run the backbone once; without gradient when it is frozen. features: whether `features` will be asked."""
        tensors = self.prepare(observation) if observation.prepared is None else dict(observation.prepared)
        return self.encode_prepared(tensors, features)

    def prepare(self, observation: PolicyInput) -> dict[str, Tensor]:
        """The host's part of `encode`: tensors whose shapes alone decide what the device will run."""
        raise NotImplementedError

    def encode_prepared(self, tensors: dict[str, Tensor], features: bool = True) -> Prefix:
        """The device's part of `encode`: no transfer to or from the host, so that a CUDA graph can hold it."""
        raise NotImplementedError

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t | prefix): float32[b·n, ah, ad], differentiable. x_t float32[b·n, ah, ad], the n samples of one
        observation adjacent; t float32[b·n]. n = 1 for a head that does not share its prefix."""
        raise NotImplementedError

    def ready(self, prefix: Prefix, times: Tensor, n: int = 1) -> Prefix:
        """The prefix with all that depends on nothing but it, the flow times float32[steps] and the parameters, for n
        samples of each row: made once a chunk, inside what a CUDA graph holds. Here: nothing but the times."""
        return replace(for_samples(self, prefix, n), flow=times)

    def velocity_at(self, prefix: Prefix, x_t: Tensor, step: int) -> Tensor:
        """`velocity` at the step's time from a prefix that is ready: float32[b·n, ah, ad], differentiable in x_t."""
        return self.velocity(prefix, x_t, prefix.flow[step].expand(len(x_t)))

    def fuse_for_serving(self) -> None:
        """Called once, after `hold`, by who only serves: the head may lay its parameters side by side in memory and
        leave autocast. Names and values stay, and values copied into the parameters are seen."""

    def features(self, prefix: Prefix) -> Tensor:
        """For critics and rewards, float32[b, f]: the mean hidden state of the tokens that count, and the state.

        Raises ValueError for a prefix that was encoded with features=False.
        """
        if prefix.hidden is None:
            raise ValueError("features: this prefix was encoded with features=False")
        keep = prefix.pad_mask.unsqueeze(-1).float()
        return torch.cat([(prefix.hidden.float() * keep).sum(1) / keep.sum(1), prefix.state], dim=-1)

    @property
    def units(self) -> Units:
        """What the policy's numbers mean."""
        return Units(self.state_units, self.action_units, self.anchors, self.poses)

    def anchor_of(self, state: Tensor) -> Tensor | None:
        """What actions are relative to when a chunk is asked at `state` float32[b, s], physical: float32[b, 1, robot
        dims], 0 where they are absolute; None where all are."""
        if self.anchors is None:
            return None
        return (state[:, self._anchor.clamp(min=0)] * (self._anchor >= 0))[:, None]

    def normalise_actions(self, chunk: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Physical float32[..., ticks, robot dims] to the model's units, zeros in the dims that the robot lacks.

        anchor: of the observation that the chunk begins at, as its prefix has it.
        """
        self._expect(anchor)
        units = self.action_units.to_model(chunk if anchor is None else to_relative(chunk, anchor, self.poses))
        return pad_last(units.clamp(-1, 1) if self.clip else units, self.action_dim)

    def physical_actions(self, chunk: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The model's units to physical float32[..., valid horizon, robot dims], absolute, clipped to the task's
        limits. anchor: of the observation that the chunk was asked at."""
        chunk = chunk[..., : self.valid_horizon, : self.robot_dim]
        self._expect(anchor)
        physical = self.action_units.to_physical(chunk.clamp(-1, 1) if self.clip else chunk)
        absolute = physical if anchor is None else to_absolute(physical, anchor, self.poses)
        return absolute.clamp(self._low, self._high)

    def _expect(self, anchor: Tensor | None) -> None:
        if (anchor is None) != (self.anchors is None):
            said = "absolute" if self.anchors is None else "relative to a state"
            raise ValueError(f"anchor: this policy's actions are {said}, got {anchor if anchor is None else 'one'}")

    def dead_parameters(self) -> set[str]:
        """Names of parameters that no action depends on, though the features of critics may."""
        raise NotImplementedError

    def save(self, folder: Path, extras: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint that LeRobot loads into a new folder. extras: what GR00T's layout keeps beside it."""
        raise NotImplementedError


def for_samples(policy: FlowPolicy, prefix: Prefix, n: int) -> Prefix:
    """The prefix as `velocity` reads it for n samples of each row: itself where the head shares it, else repeated."""
    return prefix if getattr(policy, "shares_prefix", False) else prefix.repeat(n)


def flow_times(steps: int, device: torch.device) -> Tensor:
    """Times of the Euler steps, made on the device: float32[steps], k / steps."""
    return torch.arange(steps, device=device) / steps


def sample(policy: FlowPolicy, prefix: Prefix, noise: Tensor, steps: int, n: int = 1) -> Tensor:
    """Integrate the flow by forward Euler from noise to action: float32[b·n, ah, ad] in the model's units.

    noise: float32[b·n, ah, ad]; the n samples of one observation are adjacent.
    """
    want = (len(prefix) * n, policy.action_horizon, policy.action_dim)
    if noise.shape != want:
        raise ValueError(f"noise: expected shape {want}, got {tuple(noise.shape)}")
    x, prefix = noise, policy.ready(prefix, flow_times(steps, noise.device), n)
    for k in range(steps):
        x = x + policy.velocity_at(prefix, x, k) / steps
    return x


def flow_loss(
    policy: FlowPolicy, prefix: Prefix, chunk: Tensor, is_pad: Tensor, weight: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """‖v(x_t, t | prefix) − (chunk − noise)‖² per sample, averaged over the ticks that count: float32[b].

    prefix: as `for_samples` makes it; chunk, noise: float32[b, ah, ad] in the model's units; is_pad: bool[b, ah], True
    where a tick is not a label; weight: float32[b]; t: float32[b]. Dims beyond the robot's do not count, nor ticks
    beyond those that a checkpoint was trained on (`valid_horizon`), whose labels are zeros as they were there. A sample
    whose ticks are all padding has loss 0.
    """
    beyond = getattr(policy, "valid_horizon", chunk.shape[1])
    if beyond < chunk.shape[1]:
        unused = torch.arange(chunk.shape[1], device=chunk.device) >= beyond
        chunk, is_pad = chunk.masked_fill(unused[:, None], 0), is_pad | unused
    x_t = t[:, None, None] * chunk + (1 - t[:, None, None]) * noise
    error = (policy.velocity(prefix, x_t, t) - (chunk - noise))[..., : policy.robot_dim].square().mean(-1)
    keep = (~is_pad).to(error.dtype)
    return weight * (error * keep).sum(-1) / keep.sum(-1).clamp(min=1)


def sample_times(b: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> Tensor:
    """Training flow times as PI0 draws them: 1 − t ~ 0.001 + 0.999 · Beta(1.5, 1), dense near the noise: float32[b].

    Beta(α, 1) has the closed-form quantile u^(1/α), so a seeded generator suffices.
    """
    u = torch.rand(b, generator=generator, device=device)
    return 1 - (0.001 + 0.999 * u.pow(1 / 1.5))


def trainable(policy: nn.Module) -> dict[str, Tensor]:
    """The tensors that are published: those that receive gradients."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def frozen_hash(policy: nn.Module) -> str:
    """SHA-256 over the values of the parameters that do not train."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if not parameter.requires_grad:
            raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()
