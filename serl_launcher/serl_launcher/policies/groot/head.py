"""GR00T N1.7 behind the flow-policy interface, over lerobot's own modules with our own forward path.

groot.build makes it. Why not lerobot's `forward`: noise and flow time cannot be
injected, the language head computes logits that nobody reads, cross-attention keys are made anew at every flow step,
padding is attended to, and dropout in train mode makes a policy's ratio to itself differ from 1. Time runs as ours does
(t = 0 is noise); it is bucketed to 1000 steps before the network sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.attention import attention_bias
from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix
from serl_launcher.policies.compiling import CompiledLayer
from serl_launcher.policies.groot.checkpoint import ALIASES
from serl_launcher.policies.groot.dit import (
    KeysValues,
    Layers,
    Modulation,
    attend_tokens,
    cross_block,
    cross_keys,
    cross_layers,
    modulated,
    modulations,
    own_block,
    run_dit,
    token_block,
)
from serl_launcher.policies.groot.fusing import check_fused, fuse
from serl_launcher.policies.groot.qwen import Grid, run_backbone, text_layer, vision_block
from serl_launcher.policies.groot.saving import save_groot, write_config
from serl_launcher.policies.normalise import Units, pad_last
from serl_launcher.policies.precision import FLOAT32, compute, full
from serl_launcher.policies.transfer import to_device
from serl_transport.contract.specs import TaskSpec

NEW_EMBODIMENT = "new_embodiment"  # GR00T's tag for a robot that its release does not know
Inputs = Callable[[dict[str, np.ndarray], list[str], torch.device], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class GrootPrefix(Prefix):
    """`hidden` is taken after the vision-language self-attention; keys and values are in `flow`."""

    image_mask: Tensor  # bool[b, l], True where a token is of an image
    state_features: Tensor  # float[b, 1, width of the action head]


@dataclass(frozen=True, slots=True)
class Flow:
    """What velocities of one prefix share; `time` and `norms` have an entry a flow step."""

    keys_values: Sequence[KeysValues]  # of the cross-attention layers, b rows
    biases: tuple[Tensor | None, Tensor | None]  # of text and of image tokens, float[b, 1, 1, l]; None: all are read
    leading: Tensor  # float[b·n, …, width], the tokens before the actions
    places: Tensor | None  # float[ah, width], what is added to the actions' tokens
    time: Sequence[Tensor]  # float32[width] or [b·n, 1, width], what the time adds in the action encoder
    norms: Sequence[Sequence[Modulation]]


class GrootFlowPolicy(FlowPolicy):
    """lerobot's `GR00TN17` as a flow policy: encode once, then velocity as often as wanted.

    core: `GR00TN17`; inputs: images and prompts to the backbone's tensors; embodiment: the slot of the
    embodiment-specific weights, embodiment_tag: its name; mask_padding: tokens do not attend to padding, so that an
    answer does not depend on whom it shares a batch with (the library's do). `attention: sdpa` runs the layers through
    groot.qwen and groot.dit. `train()` switches dropout on only when `dropout` is set.
    """

    released_flow_steps: ClassVar[int] = 4
    backbone_functions: ClassVar[tuple[Callable, ...]] = (vision_block, text_layer)  # of one layer each
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
        self.embodiment, self.embodiment_tag, self._serves = embodiment, embodiment_tag, False
        self.train(self.training)

    @staticmethod
    def drop_unread(core: nn.Module) -> None:
        """Let go of what no action depends on."""
        core.backbone.model.lm_head = nn.Identity()  # tied to the embedding

    def compile_layers(self, mode: str, backend: str = "inductor") -> None:
        self._backbone_layers = [CompiledLayer(f, mode, backend) for f in self.backbone_functions]
        self._layers = Layers(*(CompiledLayer(f, mode, backend) for f in (token_block, cross_block, own_block)))

    @property
    def shares_prefix(self) -> bool:
        """Our layers read one prefix row for several samples, the library's do not."""
        return self.attention == "sdpa"

    def fuse_for_serving(self) -> None:
        """Lay weights side by side (groot.fusing) and leave autocast: everything is held and computed in bf16 from here
        on, sums inside norms aside, but the projections of state and actions, which stay fp32."""
        if self.attention == "eager":
            return
        if self.precision == "bfloat16":
            for name, parameter in self.core.named_parameters():
                if not any(part in name for part in FLOAT32):
                    parameter.data = parameter.data.to(torch.bfloat16)
        fuse(self.language_layers, self.core.action_head)
        self._serves = True

    @property
    def language_layers(self) -> nn.ModuleList:
        """Of the backbone."""
        return self.backbone.model.model.language_model.layers

    def layers(self) -> list[nn.Module]:
        """Of the backbone's two towers and of the action head; the library's own passes read them in its own ways."""
        if self.attention == "eager":
            return []
        head = self.core.action_head
        blocks = (*getattr(head.vl_self_attention, "transformer_blocks", ()), *head.model.transformer_blocks)
        return [*self.vision_layers, *self.language_layers, *blocks]

    def read_outside(self) -> list[nn.Parameter]:
        """What `cross_keys` and `modulations` read beforehand."""
        model = self.core.action_head.model
        outside = [part for layer in cross_layers(model) for part in (layer.to_k, layer.to_v)] + modulated(model)
        return [parameter for part in outside for parameter in part.parameters()]

    @property
    def vision_layers(self) -> nn.ModuleList:
        """Of the backbone."""
        return self.backbone.model.model.visual.blocks

    @property
    def _dtype(self) -> torch.dtype:
        """What attention computes in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def _arithmetic(self) -> AbstractContextManager:
        """Of a pass: autocast, unless the policy serves, whose tensors are what they must be."""
        return full(self.device, self.precision) if self._serves else compute(self.precision, self.device)

    def _stream(self, x: Tensor) -> Tensor:
        """Hidden states as the layers take them: fp32 under autocast."""
        return x.to(self._dtype) if self._serves else x

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
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        with self._arithmetic():
            with torch.set_grad_enabled(trains):
                tokens = self._stream(self._run_backbone(tensors, keep))
            bias = self._bias(keep) if self.mask_padding else None
            given = (head.vl_self_attention, head.vlln(tokens), bias, self.checkpointing, self._layers.tokens)
            hidden = attend_tokens(*given)
        with full(self.device, self.precision):
            encoded = self._per_robot(head.state_encoder.layer1, tensors["state"][:, None].float()).relu()
            state_features = self._drop_states(self._per_robot(head.state_encoder.layer2, encoded))
        image_mask = tensors["input_ids"] == self.image_token
        own = (image_mask, state_features)
        return GrootPrefix(None, keep, hidden, tensors["state"], *own, anchor=tensors.get("anchor"))

    def _run_backbone(self, tensors: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Output of the last decoder layer, before the final norm: float[b, l, width]."""
        grids = tensors["image_grid_thw"].numpy()  # on the host: its values are known without waiting
        if self.attention == "sdpa" and (grids == grids[0]).all():
            grid = Grid(*grids[0, 1:].tolist(), merge=self.backbone.visual.spatial_merge_size)
            model, given = self.backbone.model.model, (tensors["input_ids"], keep, tensors["pixel_values"], grid)
            return run_backbone(model, *given, self._dtype, self.checkpointing, *self._backbone_layers)
        given = {k: tensors[k] for k in ("input_ids", "attention_mask")}
        given["pixel_values"] = self._stream(tensors["pixel_values"])
        return self._run_library(given | {"image_grid_thw": tensors["image_grid_thw"].to(self.device)})

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
        return F.linear(x, linear.W[self.embodiment].T, linear.b[self.embodiment])

    def _drop_states(self, features: Tensor) -> Tensor:
        p = self.core.action_head.state_dropout_prob
        if not (self.training and self.dropout and p > 0):
            return features
        keep = torch.rand(len(features), 1, 1, device=features.device) >= p
        return features * keep.to(features.dtype)

    def velocity(self, prefix: GrootPrefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t | prefix): float32[b·n, ah, ad], differentiable in x_t; t only through its bucket. Several samples
        of a row with `attention: sdpa`."""
        if self.attention == "eager":
            return self._by_library(prefix, x_t, t)
        with self._arithmetic():
            flow = self._flow(prefix, t, len(x_t) // len(prefix))
            norms = [(scale[:, None], shift[:, None]) for scale, shift in flow.norms[0]]
            return self._run_head(flow, x_t, flow.time[0][:, None], norms)

    def ready(self, prefix: GrootPrefix, times: Tensor, n: int = 1) -> GrootPrefix:
        """As `FlowPolicy`: the cross-attention's keys and values, masks, and what the time does, of all steps."""
        if self.attention == "eager":
            return super().ready(prefix, times, n)
        with self._arithmetic():
            flow = self._flow(prefix, times, n)
        # One time for all rows: a norm takes it as weight and bias, where their dtype is that of what is normed.
        spread = (lambda x: x) if self._serves or self.precision == "float32" else (lambda x: x[:, None, None])
        rows = [tuple(spread(part).unbind() for part in norm) for norm in flow.norms[0]]
        norms = [[(scale[k], shift[k]) for scale, shift in rows] for k in range(len(times))]
        return replace(prefix, flow=replace(flow, time=flow.time[0].unbind(), norms=norms))

    def velocity_at(self, prefix: GrootPrefix, x_t: Tensor, step: int) -> Tensor:
        """As `FlowPolicy`."""
        flow = prefix.flow
        if not isinstance(flow, Flow):
            return super().velocity_at(prefix, x_t, step)
        with self._arithmetic():
            return self._run_head(flow, x_t, flow.time[step], flow.norms[step])

    def _flow(self, prefix: GrootPrefix, times: Tensor, n: int) -> Flow:
        """Of times float32[m], all of them in the one entry of `time` float32[m, width] and `norms`."""
        head, bucket = self.core.action_head, self._bucket(times)
        check_fused(head)
        keys_values, norms = cross_keys(head.model, prefix.hidden), modulations(head.model, bucket)
        with full(self.device, self.precision):
            second = head.action_encoder.W2
            weight = second.W[self.embodiment]
            half = weight.shape[1]
            time = F.linear(_time_waves(bucket, half), weight[half:].T, second.b[self.embodiment])
            leading = torch.cat(self.leading_tokens(prefix), dim=1)
            places = head.position_embedding.weight[: self.action_horizon] if head.config.add_pos_embed else None
        leading = leading if n == 1 else leading.repeat_interleave(n, 0)
        return Flow(keys_values, self._biases(prefix), leading, places, [time], [norms])

    def _bucket(self, times: Tensor) -> Tensor:
        """Thousandths of the flow time: int64[m]."""
        # Buckets of t = k / steps must not fall one short by rounding; the library's own loop takes int(k / n · 1000).
        return (times.double() * self.core.action_head.num_timestep_buckets + 1e-4).long()

    def _bias(self, keep: Tensor) -> Tensor:
        return attention_bias(keep[:, None, None], self._dtype)

    def _biases(self, prefix: GrootPrefix) -> tuple[Tensor | None, Tensor | None]:
        images, counts = prefix.image_mask, prefix.pad_mask
        if self.core.config.use_alternate_vl_dit:
            return self._bias(~images & counts), self._bias(images & counts)
        bias = self._bias(counts) if self.mask_padding else None
        return bias, bias

    def leading_tokens(self, prefix: GrootPrefix) -> tuple[Tensor, ...]:
        """What stands before the actions in the transformer: float[b, …, width of the action head] each."""
        return (prefix.state_features,)

    def _run_head(self, flow: Flow, x_t: Tensor, time: Tensor, norms: Sequence[Modulation]) -> Tensor:
        """A velocity of x_t float32[b·n, ah, ad]; time and norms: one step's."""
        head = self.core.action_head
        with full(self.device, self.precision):
            x = torch.cat((flow.leading, self._embed_actions(x_t, time, flow.places)), dim=1)
        given = (norms, flow.keys_values, flow.biases, self.checkpointing, self._layers)
        return self._decode(run_dit(head.model, self._stream(x), *given))

    def _decode(self, out: Tensor) -> Tensor:
        """What the transformer leaves at the actions' tokens, to a velocity."""
        decoder = self.core.action_head.action_decoder
        with full(self.device, self.precision):
            out = self._per_robot(decoder.layer1, out[:, -self.action_horizon :].float()).relu()
            return self._per_robot(decoder.layer2, out)

    def _embed_actions(self, x_t: Tensor, time: Tensor, places: Tensor | None) -> Tensor:
        """`MultiEmbodimentActionEncoder` and the place in the chunk: float32[b·n, ah, width]. Its second layer reads
        actions and time side by side; the product with the time is given."""
        encoder = self.core.action_head.action_encoder
        weight = encoder.W2.W[self.embodiment]
        actions = F.linear(self._per_robot(encoder.W1, x_t), weight[: weight.shape[1]].T) + time
        actions = self._per_robot(encoder.W3, F.silu(actions))
        return actions if places is None else actions + places

    def _by_library(self, prefix: GrootPrefix, x_t: Tensor, t: Tensor) -> Tensor:
        """`velocity` by the library's layers."""
        head, bucket = self.core.action_head, self._bucket(t)
        robot = torch.full((len(x_t),), self.embodiment, device=x_t.device)
        with full(self.device, self.precision):
            actions = head.action_encoder(x_t, bucket, robot)
            if head.config.add_pos_embed:
                actions = actions + head.position_embedding.weight[: x_t.shape[1]]
            x = torch.cat((*self.leading_tokens(prefix), actions), dim=1)
        masks = {"image_mask": prefix.image_mask, "backbone_attention_mask": prefix.pad_mask}
        given = masks if self.core.config.use_alternate_vl_dit else {}
        with compute(self.precision, self.device):
            out = head.model(hidden_states=x, encoder_hidden_states=prefix.hidden, timestep=bucket, **given)
        return self._decode(out)


def _time_waves(bucket: Tensor, width: int) -> Tensor:
    """Sines and cosines of the bucketed time, as `SinusoidalPositionalEncoding`: float32[b, width]."""
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=bucket.device) * (-float(np.log(10000.0)) / half))
    angles = bucket.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
