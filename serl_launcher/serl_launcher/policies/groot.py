"""GR00T N1.7 behind the flow-policy interface, over lerobot's own modules with our own forward path.

Built from yaml by `build_groot`. Why not lerobot's `forward`: noise and flow time cannot be injected, the language
head computes logits that nobody reads, and dropout in train mode makes a policy's ratio to itself differ from 1. Time
runs as ours does (t = 0 is noise); it is bucketed to 1000 steps before the network sees it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.base import PolicyInput
from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError
from serl_launcher.policies.groot_checkpoint import build_core, fill_core, slot_of, units_of_groot
from serl_launcher.policies.normalise import Units, pad_last
from serl_transport.specs import TaskSpec

log = logging.getLogger("policy")
Inputs = Callable[[dict[str, np.ndarray], list[str]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class GrootPrefix:
    """What backbone and encoders say of an observation: read by every flow step, sample and critic."""

    hidden: Tensor  # float[b, l, width], after the vision-language self-attention
    pad_mask: Tensor  # bool[b, l], True where a token counts
    image_mask: Tensor  # bool[b, l], True where a token is of an image
    state_features: Tensor  # float[b, 1, width of the action head]
    state: Tensor  # float32[b, s], normalised, padded to the model's state dims
    embodiment: Tensor  # int64[b]

    def __len__(self) -> int:
        return len(self.state)

    def repeat(self, n: int) -> GrootPrefix:
        """The same prefix n times per sample (b -> b·n, samples of one observation adjacent), without re-encoding."""
        if n == 1:
            return self
        return GrootPrefix(*(getattr(self, name).repeat_interleave(n, 0) for name in self.__slots__))


class GrootFlowPolicy(nn.Module):
    """lerobot's `GR00TN17` as a flow policy: encode once, then velocity as often as wanted.

    core: `GR00TN17`; inputs: images and prompts to the backbone's tensors; embodiment: the slot of the
    embodiment-specific weights. `train()` switches dropout on only when `dropout` is set.
    """

    def __init__(
        self,
        core: nn.Module,
        spec: TaskSpec,
        inputs: Inputs,
        units: Units | None = None,
        embodiment: int = 0,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        config = core.config
        if not 0 <= embodiment < config.max_num_embodiments:
            raise ValueError(f"policy.embodiment: expected a slot below {config.max_num_embodiments}, got {embodiment}")
        if config.state_history_length != 1:
            raise ValueError(
                f"state_history_length: only 1 is supported, the checkpoint has {config.state_history_length}"
            )
        self.core, self.inputs = core, inputs
        self.cameras = tuple(spec.cameras)
        self.action_horizon: int = config.action_horizon
        self.action_dim: int = config.max_action_dim
        self.robot_dim = len(spec.action_names)
        units = units or Units.from_spec(spec)
        self.state_units, self.action_units = units.state, units.action
        self.register_buffer("_low", torch.tensor(spec.action_low), persistent=False)
        self.register_buffer("_high", torch.tensor(spec.action_high), persistent=False)
        self.embodiment, self.dropout = embodiment, dropout
        self.train(self.training)

    def train(self, mode: bool = True) -> GrootFlowPolicy:
        """Train mode; without `dropout` the network stays in eval mode, gradients flow all the same."""
        super().train(mode)
        self.core.train(mode and self.dropout)
        return self

    def tune(self, llm: bool, visual: bool, projector: bool, diffusion_model: bool, vlln: bool) -> None:
        """What trains, by GR00T's own flags. vlln: the norm and self-attention between backbone and action head."""
        self.core.backbone.set_trainable_parameters(llm, visual)
        self.core.action_head.set_trainable_parameters(projector, diffusion_model, vlln)
        dead = self.dead_parameters()
        for name, parameter in self.named_parameters():
            if name in dead:
                parameter.requires_grad_(False)

    def dead_parameters(self) -> set[str]:
        """Names of parameters that no flow output depends on: the language head (unless tied to the embedding) and
        the norm behind the layer that the action head reads."""
        names = {name for name, _ in self.named_parameters()}
        return {n for n in names if n.endswith("lm_head.weight") or n.endswith("language_model.norm.weight")}

    @property
    def device(self) -> torch.device:
        return self.state_units.offset.device

    @property
    def backbone(self) -> nn.Module:
        """What runs without gradient when none of it is trained: vision tower and language model."""
        return self.core.backbone

    def encode(self, observation: PolicyInput) -> GrootPrefix:
        """One pass of the backbone, then the norm, self-attention and state encoder of the action head."""
        head = self.core.action_head
        tensors = {k: v.to(self.device) for k, v in self.inputs(observation.images, observation.prompts).items()}
        trains = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            tokens = self._run_backbone(tensors)
        hidden = head.vl_self_attention(head.vlln(tokens))
        state = self.state_units.to_model(torch.as_tensor(observation.state, device=self.device))
        state = pad_last(state, self.core.config.max_state_dim)
        embodiment = torch.full((len(observation),), self.embodiment, dtype=torch.int64, device=self.device)
        state_features = self._drop_states(head.state_encoder(state[:, None], embodiment))
        image_mask = tensors["input_ids"] == self.backbone.model.config.image_token_id
        return GrootPrefix(hidden, tensors["attention_mask"] == 1, image_mask, state_features, state, embodiment)

    def _run_backbone(self, tensors: dict[str, Tensor]) -> Tensor:
        """Output of the last decoder layer, before the final norm: float[b, l, width]."""
        backbone, given = self.backbone, dict(tensors)
        backbone._ensure_mm_token_type_ids(given)
        backbone._ensure_legacy_qwen3_position_ids(given)
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.append(output if isinstance(output, Tensor) else output[0])

        hook = backbone.language_model.layers[-1].register_forward_hook(keep)
        try:
            backbone.model.model(**given, use_cache=False)
        finally:
            hook.remove()
        return seen[-1]

    def _drop_states(self, features: Tensor) -> Tensor:
        p = self.core.action_head.state_dropout_prob
        if not (self.training and self.dropout and p > 0):
            return features
        keep = torch.rand(len(features), 1, 1, device=features.device) >= p
        return features * keep.to(features.dtype)

    def velocity(self, prefix: GrootPrefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t | prefix): float32[b, ah, ad], differentiable in x_t; t only through its bucket."""
        head = self.core.action_head
        # Buckets of t = k / steps must not fall one short by rounding; the library's own loop takes int(k / n · 1000).
        bucket = (t.double() * head.num_timestep_buckets + 1e-4).long()
        actions = head.action_encoder(x_t, bucket, prefix.embodiment)
        if head.config.add_pos_embed:
            actions = actions + head.position_embedding(torch.arange(actions.shape[1], device=x_t.device))
        masks = {}
        if head.config.use_alternate_vl_dit:
            masks = {"image_mask": prefix.image_mask, "backbone_attention_mask": prefix.pad_mask}
        out = head.model(
            hidden_states=torch.cat((prefix.state_features, actions), dim=1),
            encoder_hidden_states=prefix.hidden,
            timestep=bucket,
            **masks,
        )
        return head.action_decoder(out, prefix.embodiment)[:, -self.action_horizon :].float()

    def features(self, prefix: GrootPrefix) -> Tensor:
        """Mean of the hidden states over the tokens that count, with the state beside it."""
        keep = prefix.pad_mask.unsqueeze(-1).to(prefix.hidden.dtype)
        return torch.cat([((prefix.hidden * keep).sum(1) / keep.sum(1)).float(), prefix.state], dim=-1)

    def normalise_actions(self, chunk: Tensor) -> Tensor:
        """Physical float32[..., robot dims] to the model's units, zeros in the dims the robot lacks."""
        return pad_last(self.action_units.to_model(chunk), self.action_dim)

    def physical_actions(self, chunk: Tensor) -> Tensor:
        """The model's units to physical float32[..., robot dims], clipped to the task's limits."""
        return self.action_units.to_physical(chunk[..., : self.robot_dim]).clamp(self._low, self._high)


def build_groot(
    name: str,
    spec: TaskSpec,
    init: str,
    seed: int,
    action_horizon: int,
    size: Callable,
    embodiment: int = 0,
    dropout: bool = False,
    tune: dict[str, bool] | None = None,
    checkpoint: str | None = None,
    embodiment_tag: str = "new_embodiment",
) -> GrootFlowPolicy:
    """A GR00T policy for one task; arguments as `build_pi0`. tune: GR00T's flags without `tune_`, default all True.

    init `checkpoint`: weights, units and the slot of `embodiment_tag` from a folder in NVIDIA's layout.
    Raises ValueError in the user's words.
    """
    require_diffusers()
    flags = tune_flags(tune)
    if init == "checkpoint":
        return _from_checkpoint(spec, checkpoint, embodiment_tag, action_horizon, size, dropout, flags)
    if init != "random":
        raise ValueError(f"policy.init: expected 'checkpoint' or 'random', got {init!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core, inputs = size(spec, action_horizon)
    policy = GrootFlowPolicy(core, spec, inputs, embodiment=embodiment, dropout=dropout)
    policy.tune(**flags)
    return policy


def _from_checkpoint(
    spec: TaskSpec, checkpoint: str | None, tag: str, horizon: int | None, size: Any, dropout: bool, flags: dict
) -> GrootFlowPolicy:
    if not checkpoint:
        raise ValueError("policy.checkpoint: expected a GR00T N1.7 folder or a hub name (or policy.init=random)")
    found = Checkpoint.find(checkpoint)
    core = build_core(found)
    if horizon not in (None, core.config.action_horizon):
        have = core.config.action_horizon
        raise CheckpointError(f"policy.action_horizon={horizon}: the checkpoint's chunk is {have}")
    units, slot = units_of_groot(found, tag, spec), slot_of(found, tag)
    report = fill_core(core, found)
    policy = GrootFlowPolicy(core, spec, size.inputs(spec), units, slot, dropout)
    policy.tune(**flags)
    policy.checkpoint, policy.load_report = found, report
    log.info("%s", report)
    return policy


def require_diffusers() -> None:
    """Raise ValueError that names the command when the package behind GR00T's action head is missing."""
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("tree") is None:
        raise ValueError("policy: GR00T needs the packages diffusers and dm-tree: pip install 'lerobot[groot]==0.6.1'")


TUNE = ("llm", "visual", "projector", "diffusion_model", "vlln")


def tune_flags(tune: dict[str, bool] | None) -> dict[str, bool]:
    """All flags, those not given True. Raises ValueError naming an unknown one."""
    given = dict(tune or {})
    unknown = [key for key in given if key not in TUNE]
    if unknown:
        raise ValueError(f"policy.tune: unknown flag {unknown[0]!r}; the flags are {list(TUNE)}")
    return {key: bool(given.get(key, True)) for key in TUNE}
