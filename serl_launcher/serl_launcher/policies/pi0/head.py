"""PI0 behind the flow-policy interface, over lerobot's own modules with our own forward path.

pi0.build makes it for the trainer, the policy server and a local policy. Why not lerobot's `forward`: it
ignores the pad mask, runs the backbone again for every noise sample, and `from_pretrained` keeps random weights where
a tensor is missing. Time runs backwards there (τ = 1 is noise, velocity = noise − action); converted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix
from serl_launcher.policies.compiling import CompiledLayer
from serl_launcher.policies.normalise import Units, pad_last
from serl_launcher.policies.pi0.flow import Flow, cut, positions, repeated, room, seen, steps_of
from serl_launcher.policies.pi0.fusing import check_fused, fuse
from serl_launcher.policies.pi0.gemma import (
    KeysValues,
    Modulation,
    bias_of_rows,
    gemma_layer,
    modulations,
    rotary,
    run_layers,
)
from serl_launcher.policies.pi0.saving import save_pi0
from serl_launcher.policies.pi0.siglip import run_tower, vision_layer
from serl_launcher.policies.precision import compute, full
from serl_launcher.policies.tokens import Tokenizer
from serl_launcher.policies.transfer import joined, to_device
from serl_transport.contract.specs import TaskSpec


class PI0FlowPolicy(FlowPolicy):
    """lerobot's `PI0Pytorch` as a flow policy: encode once, then velocity as often as wanted.

    core: built by a size (pi0.tiny, pi0.full), on the meta device where a checkpoint or nothing fills it; `attention:
    sdpa` runs its layers through pi0.gemma.
    """

    kind: ClassVar[str] = "pi0"  # `type` in a checkpoint's config.json
    statistics_mode: ClassVar[str] = "MEAN_STD"  # that LeRobot normalises with where no checkpoint says so
    released_flow_steps: ClassVar[int] = 10
    states: ClassVar[int] = 1  # tokens of the state beside the actions

    def __init__(
        self,
        core: nn.Module,
        spec: TaskSpec,
        tokenizer: Tokenizer,
        units: Units | None = None,
        attention: str = "eager",
        checkpointing: bool = False,
        precision: str = "float32",
        cameras: tuple[str, ...] | None = None,
        compile: str = "off",
    ) -> None:
        # What no flow policy reads goes: 790M parameters at full size. pi0.saving writes them from the source.
        backbone = core.paligemma_with_expert
        backbone.paligemma.lm_head, backbone.gemma_expert.lm_head = nn.Identity(), nn.Identity()
        if precision != "float32" and attention != "sdpa":
            raise ValueError("policy.precision: bfloat16 needs policy.attention=sdpa")
        if checkpointing and attention != "sdpa":
            raise ValueError("policy.checkpointing: needs policy.attention=sdpa (eager would nest two checkpoints)")
        switches = dict(attention=attention, checkpointing=checkpointing, precision=precision, compile=compile)
        chunk = (core.config.chunk_size, core.config.max_action_dim)
        super().__init__(core, spec, cameras or tuple(spec.cameras), units, chunk, **switches)
        self.tokenizer, self._serves = tokenizer, False
        self.image_size: int = core.config.image_resolution[0]
        if precision == "bfloat16":
            _keep_float32(backbone.paligemma.model.vision_tower.vision_model.embeddings)

    def compile_layers(self, mode: str, backend: str = "inductor") -> None:
        self._layer, self._vision_layer = (CompiledLayer(f, mode, backend) for f in (gemma_layer, vision_layer))

    def layers(self) -> list[nn.Module]:
        """SigLIP's, the language model's and the expert's; the library's own passes read them in its own ways."""
        if self.attention == "eager":
            return []
        tower, language = self.backbone.model.vision_tower.vision_model, self.backbone.model.language_model
        return [*tower.encoder.layers, *language.layers, *self.expert.layers]

    def read_outside(self) -> list[nn.Parameter]:
        """The norms', which `modulations` reads beforehand."""
        both = (*self.backbone.model.language_model.layers, *self.expert.layers)
        norms = [norm for layer in both for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        return [parameter for norm in norms for parameter in norm.parameters()]

    def dead_parameters(self) -> set[str]:
        """Names of parameters that no action depends on: the prefix's hidden states behind the last layer's keys and
        values are read by `features` alone."""
        language = "core.paligemma_with_expert.paligemma.model.language_model."
        last = f"{language}layers.{len(self.backbone.model.language_model.layers) - 1}."
        parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.", "post_attention_layernorm")
        unread = (f"{language}norm.", *(last + part for part in parts))
        return {name for name, _ in self.named_parameters() if name.startswith(unread)}

    def save(self, folder: Path, extras: Mapping[str, Any] | None = None) -> Path:
        """Write it as LeRobot's `pi0` or `pi05`, whose folders have no place for `extras`."""
        return save_pi0(self, folder)

    @property
    def backbone(self) -> nn.Module:
        """What only the prefix runs through: vision tower, projector, language model."""
        return self.core.paligemma_with_expert.paligemma

    @property
    def expert(self) -> nn.Module:
        """What the flow runs through: a `PiGemmaModel`."""
        return self.core.paligemma_with_expert.gemma_expert.model

    @property
    def shares_prefix(self) -> bool:
        """Our layers read one prefix row for several samples, the library's do not."""
        return self.attention == "sdpa"

    def fuse_for_serving(self) -> None:
        """Lay weights side by side (pi0.fusing) and leave autocast: activations and biases are bf16 from here on where
        the weights are; norms, rotary embeddings, the projections of actions, state and time stay fp32."""
        if self.attention == "eager":
            return
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data = module.bias.data.to(module.weight.dtype)
        model = self.backbone.model
        fuse((model.language_model, self.expert), model.vision_tower.vision_model)
        self._serves = True

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

    def prepare(self, observation: PolicyInput) -> dict[str, Tensor]:
        """The host's part of `encode`, on the device: pixels float32[b, cameras, 3, side, side] in [−1, 1], ids and
        mask [b, l], state float32[b, s] in the model's units; anchor where actions are relative."""
        b = len(observation)
        physical = to_device(observation.state, self.device)
        state, anchor = self.state_units.to_model(physical), self.anchor_of(physical)
        ids, mask = self.tokenizer(*self._prompts(observation.prompts, state))
        pixels = state.new_empty(b, 0, 3, self.image_size, self.image_size)
        if self.cameras:  # a task may have states alone
            pixels = torch.stack(self._pixels(observation.images).split(b), dim=1)
        ids, mask = (to_device(x, self.device) for x in (ids, mask))
        tensors = {"pixels": pixels, "ids": ids, "mask": mask, "state": state}
        return tensors if anchor is None else tensors | {"anchor": anchor}

    def encode_prepared(self, tensors: dict[str, Tensor], features: bool = True) -> Prefix:
        """One pass of SigLIP over all cameras and of the language model over image and prompt tokens, without gradient
        when nothing of the backbone is trained. `tensors` as `prepare` returns them. Without gradient, keys and values
        come with room for the expert's tokens; without `features`, the last layer ends at its own."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        state, pad_mask = tensors["state"], tensors["mask"]
        spare = 0 if torch.is_grad_enabled() else self.states + self.action_horizon
        with torch.set_grad_enabled(trains), self._arithmetic():
            embeddings = self.core.paligemma_with_expert.embed_language_tokens(tensors["ids"])
            if self.cameras:
                images = self._embed_images(tensors["pixels"].flatten(0, 1))
                images = images.view(len(state), -1, images.shape[-1])  # b·cameras, l, width -> b, all tokens, width
                seen = torch.ones(images.shape[:2], dtype=torch.bool, device=state.device)
                embeddings, pad_mask = torch.cat([images, embeddings], dim=1), torch.cat([seen, pad_mask], dim=1)
            run = self._run_prefix if self.attention == "sdpa" else self._run_library
            hidden, keys_values = run(embeddings, pad_mask, features, spare)
        state = pad_last(state, self.core.config.max_state_dim)
        return Prefix(keys_values, pad_mask, hidden, state, anchor=tensors.get("anchor"))

    def _embed_images(self, pixels: Tensor) -> Tensor:
        """float32[b, 3, side, side] to tokens float[b, l, width]."""
        if self.attention == "eager":
            return self.core.paligemma_with_expert.embed_image(pixels)
        model, dtype = self.backbone.model, self._dtype if self._serves else None
        tokens = run_tower(model.vision_tower.vision_model, pixels, dtype, self._vision_layer, self.checkpointing)
        return model.multi_modal_projector(tokens).to(dtype or pixels.dtype)

    def _prompts(self, prompts: list[str], state: Tensor) -> tuple[list[str], int]:
        """What the tokenizer gets, prompts and the length that they are padded to at least: PI0's prompts end in a
        newline; its state goes beside the actions."""
        return [prompt if prompt.endswith("\n") else f"{prompt}\n" for prompt in prompts], 0

    def _run_prefix(
        self, x: Tensor, pad_mask: Tensor, features: bool, spare: int
    ) -> tuple[Tensor | None, list[KeysValues]]:
        """Hidden states, where they are asked for, and keys and values, with `spare` more tokens of room."""
        language = self.backbone.model.language_model
        check_fused(language)
        config, (b, length) = language.config, pad_mask.shape
        shape = (b, config.num_key_value_heads, length + spare, config.head_dim)
        past = [tuple(x.new_empty(shape, dtype=self._dtype) for _ in "kv") for _ in language.layers] if spare else None
        # Rows of padding attend like the others: nobody reads them, and no row may attend to nothing.
        return run_layers(
            language,
            self._stream(x),
            rotary(language, torch.cumsum(pad_mask, dim=1) - 1),
            bias_of_rows(pad_mask[:, None], self._dtype, 1),
            modulations(language),
            past,
            self._layer,
            start=0 if spare else None,
            hidden=features,
            checkpointing=self.checkpointing,
        )

    def _run_library(self, embeddings: Tensor, pad_mask: Tensor, *_: Any) -> tuple[Tensor, list[KeysValues]]:
        """The library's layers: hidden states, and keys and values without room."""
        language, positions = self.backbone.model.language_model, torch.cumsum(pad_mask, dim=1) - 1
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        language.config._attn_implementation = "eager"
        (hidden, _), cache = self.core.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad_mask, torch.zeros_like(pad_mask))),
            position_ids=positions,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        return hidden, [(layer[0], layer[1]) for layer in cache]

    def _pixels(self, images: dict[str, np.ndarray]) -> Tensor:
        """uint8[b, h, w, 3] per camera to float32[cameras·b, 3, size, size] in [−1, 1], camera-major."""
        given = [images[camera] for camera in self.cameras]
        if len({x.shape for x in given}) > 1:
            return torch.cat([self._centred(to_device(x, self.device)) for x in given])
        return self._centred(joined(given, self.device))

    def _centred(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        if pixels.shape[-2:] == (self.image_size, self.image_size):
            return pixels.div(127.5).sub(1)
        from lerobot.policies.common.vla_utils import resize_with_pad_torch

        # It clamps to [0, 1], so that it must see pixels before they are centred.
        return resize_with_pad_torch(pixels.div(255), self.image_size, self.image_size).mul(2).sub(1)

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t | prefix): float32[b·n, ah, ad], differentiable; several samples of a row with `attention: sdpa`."""
        if self.attention == "eager":
            from transformers import DynamicCache

            cache = DynamicCache(tuple((keys, values, None) for keys, values in prefix.keys_values))
            return -self._library_step(prefix, cache, x_t, 1 - t)
        mask, states, horizon = prefix.pad_mask, self.states, self.action_horizon
        n, before = len(x_t) // len(prefix), cut(prefix.keys_values, mask.shape[1])
        with self._arithmetic():
            with full(self.device, self.precision):
                time = self._embed_time(1 - t)
                x = self._embed_actions(x_t, time[:, None]).unflatten(0, (-1, n)).flatten(1, 2)
                x = torch.cat([self._embed_state(prefix.state), x], dim=1) if states else x
            bias = self._bias(seen(mask, states, horizon, n, slice(0, None)))
            rope = rotary(self.expert, positions(mask, states, horizon, n))
            norms = self._norms(time[:, None] if n == 1 else time.view(len(prefix), n, 1, -1))
            hidden, _ = run_layers(
                self.expert, self._stream(x), rope, bias, norms, before, self._layer, checkpointing=self.checkpointing
            )
            return self._read_actions(hidden[:, states:], n)

    def ready(self, prefix: Prefix, times: Tensor, n: int = 1) -> Prefix:
        """As `FlowPolicy`: masks, places, embedded times and modulations of all steps, and the state's keys and values
        in the prefix's room, a copy of which each of several samples has: beside each other's, attention would read and
        mask them all. Under gradient every step is a pass of its own (`velocity`), as in training."""
        if self.attention == "eager" or torch.is_grad_enabled():
            return super().ready(prefix, times, n)
        mask, states, horizon = prefix.pad_mask, self.states, self.action_horizon
        length = mask.shape[1]
        past = room(prefix.keys_values, length, length + states + horizon)
        with self._arithmetic():
            with full(self.device, self.precision):
                time = self._embed_time(1 - times)
            norms = steps_of(self._norms(time), len(times))
            if states:
                self._remember_state(prefix, past, norms[0])
            if n > 1:
                mask, past = mask.repeat_interleave(n, 0), repeated(past, n)
            rope = rotary(self.expert, positions(mask, states, horizon, 1)[:, states:])
            bias = self._bias(seen(mask, states, horizon, 1, slice(states, None)))
        return replace(prefix, flow=Flow(past, length + states, rope, bias, time.unbind(), norms))

    def _remember_state(self, prefix: Prefix, past: Sequence[KeysValues], norms: Sequence[Modulation]) -> None:
        """Write the state's keys and values behind the prefix's."""
        mask = prefix.pad_mask
        with full(self.device, self.precision):
            x = self._embed_state(prefix.state)
        rope, bias = rotary(self.expert, positions(mask, 1, 0, 1)), self._bias(seen(mask, 1, 0, 1, slice(1, None)))
        start = mask.shape[1]
        run_layers(self.expert, self._stream(x), rope, bias, norms, past, self._layer, start=start, hidden=False)

    def velocity_at(self, prefix: Prefix, x_t: Tensor, step: int) -> Tensor:
        """As `FlowPolicy`. Keys and values of the actions go into the prefix's room in place; where x_t has a gradient,
        into views without history, so that nothing of the prefix is copied and each step is differentiated by itself,
        before the next one."""
        flow = prefix.flow
        if not isinstance(flow, Flow):
            return super().velocity_at(prefix, x_t, step)
        past = [(keys.detach(), values.detach()) for keys, values in flow.past] if x_t.requires_grad else flow.past
        with self._arithmetic():
            with full(self.device, self.precision):
                x = self._embed_actions(x_t, flow.time[step])
            hidden, _ = run_layers(
                *(self.expert, self._stream(x), flow.rope, flow.bias, flow.norms[step], past, self._layer),
                start=flow.start,
            )
            return self._read_actions(hidden, 1)

    def _bias(self, keep: Tensor) -> Tensor:
        config = self.expert.config
        return bias_of_rows(keep, self._dtype, config.num_attention_heads // config.num_key_value_heads)

    def _read_actions(self, hidden: Tensor, n: int) -> Tensor:
        """The expert's hidden states of n samples a row to a forward velocity: float32[b·n, ah, ad]."""
        with full(self.device, self.precision):
            return -self.core.action_out_proj(hidden.unflatten(1, (n, -1)).flatten(0, 1).float())

    def _library_step(self, prefix: Prefix, cache, x_tau: Tensor, tau: Tensor) -> Tensor:
        return self.core.denoise_step(prefix.state, prefix.pad_mask, cache, x_tau, tau)

    def _embed_state(self, state: Tensor) -> Tensor:
        """float32[b, s] to its token float32[b, 1, width]."""
        return self.core.state_proj(state)[:, None]

    def _embed_time(self, tau: Tensor) -> Tensor:
        """What the time adds to the first layer behind the actions' projection: float32[m], to float32[m, width]."""
        layer = self.core.action_time_mlp_in
        return F.linear(self._time(tau), layer.weight[:, layer.out_features :], layer.bias)

    def _embed_actions(self, x_tau: Tensor, time: Tensor) -> Tensor:
        """The actions' tokens float32[b, ah, width]; time: `_embed_time`, to be added."""
        core, width = self.core, self.core.action_time_mlp_in.out_features
        actions = F.linear(core.action_in_proj(x_tau), core.action_time_mlp_in.weight[:, :width])
        return core.action_time_mlp_out(F.silu(actions + time))

    def _norms(self, time: Tensor) -> list[Modulation]:
        """The expert's modulations at these times: none here."""
        return modulations(self.expert)

    def _time(self, tau: Tensor) -> Tensor:
        from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

        width, config = self.core.action_in_proj.out_features, self.core.config
        waves = create_sinusoidal_pos_embedding(tau, width, config.min_period, config.max_period, device=tau.device)
        return waves.to(tau.dtype)


def _keep_float32(module: nn.Module) -> None:
    """Run a module outside autocast."""
    inner = module.forward

    def forward(*args, **kwargs):
        with full(next(module.parameters()).device, "bfloat16"):
            return inner(*args, **kwargs)

    module.forward = forward
