"""GR00T N1.7 behind the flow-policy interface, over lerobot's own modules with our own forward path.

groot.build makes it. Why not lerobot's `forward`: noise and flow time cannot be
injected, the language head computes logits that nobody reads, cross-attention keys are made anew at every flow step,
padding is attended to, and dropout in train mode makes a policy's ratio to itself differ from 1. Time runs as ours does
(t = 0 is noise); it is bucketed to 1000 steps before the network sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix
from serl_launcher.policies.compiling import CompiledLayer
from serl_launcher.policies.groot.checkpoint import ALIASES
from serl_launcher.policies.groot.dit import attend_tokens, cross_keys, dit_block, run_dit
from serl_launcher.policies.groot.qwen import Grid, run_backbone, text_layer, vision_block
from serl_launcher.policies.groot.saving import save_groot, write_config
from serl_launcher.policies.normalise import Units, pad_last
from serl_launcher.policies.precision import compute, full
from serl_launcher.policies.transfer import to_device
from serl_transport.contract.specs import TaskSpec

NEW_EMBODIMENT = "new_embodiment"  # GR00T's tag for a robot that its release does not know
Inputs = Callable[[dict[str, np.ndarray], list[str], torch.device], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class GrootPrefix(Prefix):
    """`hidden` is taken after the vision-language self-attention; keys and values are the cross-attention's."""

    image_mask: Tensor  # bool[b, l], True where a token is of an image
    state_features: Tensor  # float[b, 1, width of the action head]


class GrootFlowPolicy(FlowPolicy):
    """lerobot's `GR00TN17` as a flow policy: encode once, then velocity as often as wanted.

    core: `GR00TN17`; inputs: images and prompts to the backbone's tensors; embodiment: the slot of the
    embodiment-specific weights, embodiment_tag: its name; mask_padding: tokens do not attend to padding, so that an
    answer does not depend on whom it shares a batch with (the library's do). `attention: sdpa` runs the layers through
    groot.qwen and groot.dit. `train()` switches dropout on only when `dropout` is set.
    """

    released_flow_steps: ClassVar[int] = 4
    aliases: ClassVar[dict[str, str]] = ALIASES  # name -> another that a file may have for the same tensor

    def __init__(
        self,
        core: nn.Module,
        spec: TaskSpec,
        inputs: Inputs,
        units: Units | None = None,
        embodiment: int = 0,
        dropout: bool = False,
        *,
        embodiment_tag: str = NEW_EMBODIMENT,
        attention: str = "sdpa",
        checkpointing: bool = False,
        precision: str = "float32",
        mask_padding: bool = True,
        clip: bool = False,
        valid_horizon: int | None = None,
        compile: str = "off",
    ) -> None:
        self.drop_unread(core)
        config = core.config
        if not 0 <= embodiment < config.max_num_embodiments:
            raise ValueError(f"policy.embodiment: expected a slot below {config.max_num_embodiments}, got {embodiment}")
        if config.state_history_length != 1:
            got = config.state_history_length
            raise ValueError(f"state_history_length: only 1 is supported, the checkpoint has {got}")
        if attention == "eager" and (checkpointing or mask_padding):
            raise ValueError("policy.attention=eager: set checkpointing=false and mask_padding=false (the library's)")
        switches = dict(attention=attention, checkpointing=checkpointing, precision=precision, compile=compile)
        chunk = (config.action_horizon, config.max_action_dim)
        cameras = tuple(getattr(inputs, "cameras", spec.cameras))
        super().__init__(core, spec, cameras, units, chunk, valid_horizon=valid_horizon, clip=clip, **switches)
        self.inputs, self.mask_padding, self.dropout = inputs, mask_padding, dropout
        self.embodiment, self.embodiment_tag = embodiment, embodiment_tag
        self.train(self.training)

    @staticmethod
    def drop_unread(core: nn.Module) -> None:
        """Let go of what no action depends on."""
        core.backbone.model.lm_head = nn.Identity()  # tied to the embedding

    def compile_layers(self, mode: str, backend: str = "inductor") -> None:
        self._layers = [CompiledLayer(f, mode, backend) for f in (vision_block, text_layer)]
        self._dit_block = CompiledLayer(dit_block, mode, backend)

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
        """Names of parameters that no action depends on: the norm behind the layer that the action head reads."""
        return {name for name, _ in self.named_parameters() if name.endswith("language_model.norm.weight")}

    def save(self, folder: Path, extras: Mapping[str, Any] | None = None) -> Path:
        """Write it in the layout that it came from, NVIDIA's without one; `extras` as `save_groot`."""
        return save_groot(self, folder, extras)

    def write_config(self, folder: Path) -> None:
        """What an export of weights that began at random has as its configuration."""
        write_config(self, folder)

    @property
    def backbone(self) -> nn.Module:
        """What runs without gradient when none of it is trained: vision tower and language model."""
        return self.core.backbone

    @property
    def image_token(self) -> int:
        """Id of the tokens in whose place pictures stand."""
        return self.backbone.model.config.image_token_id

    def prepare(self, observation: PolicyInput) -> dict[str, Tensor]:
        """The host's part: tokens, patches and the normalised state on the device (the grid stays on the host)."""
        tensors = self.inputs(observation.images, observation.prompts, self.device)
        tensors = {k: v if k == "image_grid_thw" else to_device(v, self.device) for k, v in tensors.items()}
        physical = to_device(observation.state, self.device)
        state, anchor = self.state_units.to_model(physical), self.anchor_of(physical)
        state = state.clamp(-1, 1) if self.clip else state
        tensors["state"] = pad_last(state, self.core.config.max_state_dim)
        return tensors if anchor is None else tensors | {"anchor": anchor}

    def encode_prepared(self, tensors: dict[str, Tensor], features: bool = True) -> GrootPrefix:
        """One pass of the backbone, then the norm, self-attention and state encoder of the action head; `tensors` as
        `prepare` returns them. The hidden states are there in any case: the action head reads them."""
        head, keep = self.core.action_head, tensors["attention_mask"] == 1
        trains = any(p.requires_grad for p in self.backbone.parameters())
        with compute(self.precision, self.device):
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
                tokens = self._run_backbone(tensors, keep)
            mask = keep if self.mask_padding else None
            hidden = attend_tokens(head.vl_self_attention, head.vlln(tokens), mask, self.checkpointing)
        with full(self.device, self.precision):
            encoded = self._per_robot(head.state_encoder.layer1, tensors["state"][:, None].float()).relu()
            state_features = self._drop_states(self._per_robot(head.state_encoder.layer2, encoded))
        image_mask = tensors["input_ids"] == self.image_token
        own = (image_mask, state_features)
        return GrootPrefix(None, keep, hidden, tensors["state"], *own, anchor=tensors.get("anchor"))

    def _run_backbone(self, tensors: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Output of the last decoder layer, before the final norm: float[b, l, width]."""
        grids = tensors["image_grid_thw"]
        if self.attention == "sdpa" and bool((grids == grids[0]).all()):
            grid = Grid(*grids[0, 1:].tolist(), merge=self.backbone.visual.spatial_merge_size)
            model, given = self.backbone.model.model, (tensors["input_ids"], keep, tensors["pixel_values"], grid)
            return run_backbone(model, *given, self.checkpointing, *self._layers)
        given = {k: tensors[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        return self._run_library(given | {"image_grid_thw": grids.to(self.device)})

    def _run_library(self, given: dict[str, Tensor]) -> Tensor:
        backbone = self.backbone
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

    def _per_robot(self, linear: Any, x: Tensor) -> Tensor:
        """A layer that holds weights for every embodiment: only this one's are read."""
        return x @ linear.W[self.embodiment] + linear.b[self.embodiment]

    def _drop_states(self, features: Tensor) -> Tensor:
        p = self.core.action_head.state_dropout_prob
        if not (self.training and self.dropout and p > 0):
            return features
        keep = torch.rand(len(features), 1, 1, device=features.device) >= p
        return features * keep.to(features.dtype)

    def ready(self, prefix: GrootPrefix, times: Tensor, n: int = 1) -> GrootPrefix:
        """The prefix with cross-attention keys made once, for a caller that takes several flow steps from it."""
        if self.attention == "sdpa" and prefix.keys_values is None:
            with compute(self.precision, self.device):
                prefix = replace(prefix, keys_values=cross_keys(self.core.action_head.model, prefix.hidden))
        return super().ready(prefix, times, n)

    def velocity(self, prefix: GrootPrefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t | prefix): float32[b, ah, ad], differentiable in x_t; t only through its bucket."""
        head = self.core.action_head
        # Buckets of t = k / steps must not fall one short by rounding; the library's own loop takes int(k / n · 1000).
        bucket = (t.double() * head.num_timestep_buckets + 1e-4).long()
        with full(self.device, self.precision):
            x = torch.cat((*self.leading_tokens(prefix), self._embed_actions(x_t, bucket)), dim=1)
        with compute(self.precision, self.device):
            out = self._run_head(prefix, x, bucket)
        with full(self.device, self.precision):
            decoder = head.action_decoder
            out = self._per_robot(decoder.layer1, out[:, -self.action_horizon :].float()).relu()
            return self._per_robot(decoder.layer2, out)

    def leading_tokens(self, prefix: GrootPrefix) -> tuple[Tensor, ...]:
        """What stands before the actions in the transformer: float[b, …, width of the action head] each."""
        return (prefix.state_features,)

    def _embed_actions(self, x_t: Tensor, bucket: Tensor) -> Tensor:
        """`MultiEmbodimentActionEncoder` and the place in the chunk: float32[b, ah, width]."""
        head = self.core.action_head
        encoder, horizon = head.action_encoder, x_t.shape[1]
        actions = self._per_robot(encoder.W1, x_t)
        time = _time_waves(bucket, actions.shape[-1])[:, None].expand_as(actions)
        actions = torch.nn.functional.silu(self._per_robot(encoder.W2, torch.cat([actions, time], -1)))
        actions = self._per_robot(encoder.W3, actions)
        return actions + head.position_embedding.weight[:horizon] if head.config.add_pos_embed else actions

    def _run_head(self, prefix: GrootPrefix, x: Tensor, bucket: Tensor) -> Tensor:
        model, alternate = self.core.action_head.model, self.core.config.use_alternate_vl_dit
        if self.attention == "sdpa":
            images, counts = prefix.image_mask, prefix.pad_mask
            read = (~images & counts, images & counts) if alternate else (counts, counts)
            masks = tuple(m[:, None, None] for m in read) if alternate or self.mask_padding else None
            keys_values = prefix.keys_values or cross_keys(model, prefix.hidden)
            return run_dit(model, x, bucket, keys_values, masks, self.checkpointing, self._dit_block)
        masks = {"image_mask": prefix.image_mask, "backbone_attention_mask": prefix.pad_mask} if alternate else {}
        return model(hidden_states=x, encoder_hidden_states=prefix.hidden, timestep=bucket, **masks)


def _time_waves(bucket: Tensor, width: int) -> Tensor:
    """Sines and cosines of the bucketed time, as `SinusoidalPositionalEncoding`: float32[b, width]."""
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=bucket.device) * (-float(np.log(10000.0)) / half))
    angles = bucket.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
