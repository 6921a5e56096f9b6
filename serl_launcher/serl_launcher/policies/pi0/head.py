"""PI0 behind the flow-policy interface, over lerobot's own modules with our own forward path.

pi0.build makes it for the trainer, the policy server and a local policy. Why not lerobot's `forward`: it
ignores the pad mask, runs the backbone again for every noise sample, and `from_pretrained` keeps random weights where
a tensor is missing. Time runs backwards there (τ = 1 is noise, velocity = noise − action); converted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix
from serl_launcher.policies.compiling import CompiledLayer
from serl_launcher.policies.normalise import Units, pad_last
from serl_launcher.policies.pi0.gemma import gemma_layer, run_layers
from serl_launcher.policies.pi0.saving import save_pi0
from serl_launcher.policies.precision import compute, full
from serl_launcher.policies.tokens import Tokenizer
from serl_launcher.policies.transfer import to_device
from serl_transport.contract.specs import TaskSpec


class PI0FlowPolicy(FlowPolicy):
    """lerobot's `PI0Pytorch` as a flow policy: encode once, then velocity as often as wanted.

    core: built by a size (pi0.tiny, pi0.full), on the meta device where a checkpoint or nothing fills it; `attention:
    sdpa` runs its layers through pi0.gemma.
    """

    kind: ClassVar[str] = "pi0"  # `type` in a checkpoint's config.json
    statistics_mode: ClassVar[str] = "MEAN_STD"  # that LeRobot normalises with where no checkpoint says so
    released_flow_steps: ClassVar[int] = 10

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
        self.tokenizer = tokenizer
        self.image_size: int = core.config.image_resolution[0]
        if precision == "bfloat16":
            _keep_float32(backbone.paligemma.model.vision_tower.vision_model.embeddings)

    def compile_layers(self, mode: str, backend: str = "inductor") -> None:
        self._layer = CompiledLayer(gemma_layer, mode, backend)

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

    def prepare(self, observation: PolicyInput) -> dict[str, Tensor]:
        """The host's part of `encode`, on the device: pixels float32[b, cameras, 3, side, side] in [−1, 1], ids and
        mask [b, l], state float32[b, s] in the model's units; anchor where actions are relative."""
        b = len(observation)
        physical = to_device(observation.state, self.device)
        state, anchor = self.state_units.to_model(physical), self.anchor_of(physical)
        ids, mask = self.tokenizer(self._prompts(observation.prompts, state))
        pixels = state.new_empty(b, 0, 3, self.image_size, self.image_size)
        if self.cameras:  # a task may have states alone
            pixels = torch.stack(self._pixels(observation.images).split(b), dim=1)
        ids, mask = (to_device(x, self.device) for x in (ids, mask))
        tensors = {"pixels": pixels, "ids": ids, "mask": mask, "state": state}
        return tensors if anchor is None else tensors | {"anchor": anchor}

    def encode_prepared(self, tensors: dict[str, Tensor], features: bool = True) -> Prefix:
        """One pass of SigLIP over all cameras and of the language model over image and prompt tokens, without gradient
        when nothing of the backbone is trained. `tensors` as `prepare` returns them."""
        trains = any(p.requires_grad for p in self.backbone.parameters())
        state, pad_mask, embed = tensors["state"], tensors["mask"], self.core.paligemma_with_expert
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains), compute(self.precision, self.device):
            embeddings = embed.embed_language_tokens(tensors["ids"])
            if self.cameras:
                images = embed.embed_image(tensors["pixels"].flatten(0, 1))
                images = images.view(len(state), -1, images.shape[-1])  # b·cameras, l, width -> b, all tokens, width
                seen = torch.ones(images.shape[:2], dtype=torch.bool, device=state.device)
                embeddings, pad_mask = torch.cat([images, embeddings], dim=1), torch.cat([seen, pad_mask], dim=1)
            hidden, keys_values = self._run_prefix(embeddings, pad_mask)
        state = pad_last(state, self.core.config.max_state_dim)
        return Prefix(keys_values, pad_mask, hidden, state, anchor=tensors.get("anchor"))

    def _prompts(self, prompts: list[str], state: Tensor) -> list[str]:
        """What the tokenizer gets: PI0's prompts end in a newline; its state goes beside the actions."""
        return [prompt if prompt.endswith("\n") else f"{prompt}\n" for prompt in prompts]

    def _run_prefix(self, embeddings: Tensor, pad_mask: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        language = self.backbone.model.language_model
        positions = torch.cumsum(pad_mask, dim=1) - 1
        if self.attention == "sdpa":
            # Rows of padding attend like the others: nobody reads them, and no row may attend to nothing.
            mask = pad_mask[:, None, None, :]
            return run_layers(language, embeddings, positions, mask, None, None, self.checkpointing, self._layer)
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
            return torch.cat([self._centred(x) for x in given])
        return self._centred(np.concatenate(given))

    def _centred(self, images: np.ndarray) -> Tensor:
        pixels = to_device(images, self.device).permute(0, 3, 1, 2).float()
        if pixels.shape[-2:] == (self.image_size, self.image_size):
            return pixels.div(127.5).sub(1)
        from lerobot.policies.common.vla_utils import resize_with_pad_torch

        # It clamps to [0, 1], so that it must see pixels before they are centred.
        return resize_with_pad_torch(pixels.div(255), self.image_size, self.image_size).mul(2).sub(1)

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t | prefix): float32[b, ah, ad], differentiable."""
        if self.attention == "sdpa":
            with compute(self.precision, self.device):
                return -self._expert(prefix, x_t, 1 - t)
        from transformers import DynamicCache

        cache = DynamicCache(tuple((keys, values, None) for keys, values in prefix.keys_values))
        return -self._library_step(prefix, cache, x_t, 1 - t)

    def _library_step(self, prefix: Prefix, cache, x_tau: Tensor, tau: Tensor) -> Tensor:
        return self.core.denoise_step(prefix.state, prefix.pad_mask, cache, x_tau, tau)

    def _embed_suffix(self, prefix: Prefix, x_tau: Tensor, tau: Tensor) -> tuple[Tensor, Tensor | None]:
        """The expert's tokens, the state's before the actions', and what conditions its norms (nothing here)."""
        core = self.core
        actions = core.action_in_proj(x_tau)
        time = self._time(tau)[:, None].expand_as(actions)
        actions = core.action_time_mlp_out(F.silu(core.action_time_mlp_in(torch.cat([actions, time], dim=-1))))
        return torch.cat([core.state_proj(prefix.state)[:, None], actions], dim=1), None

    def _time(self, tau: Tensor) -> Tensor:
        from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

        width, config = self.core.action_in_proj.out_features, self.core.config
        waves = create_sinusoidal_pos_embedding(tau, width, config.min_period, config.max_period, device=tau.device)
        return waves.to(tau.dtype)

    def _expert(self, prefix: Prefix, x_tau: Tensor, tau: Tensor) -> Tensor:
        """The library's backward velocity from the cached prefix: float32[b, ah, ad]."""
        with full(self.device, self.precision):
            x, condition = self._embed_suffix(prefix, x_tau, tau)
        n = x.shape[1]
        # The state's token, where there is one, does not see the actions; nothing here is copied from the host.
        block = (torch.arange(n, device=x.device) >= n - self.action_horizon).expand(len(x), n)
        own = block[:, None, :] <= block[:, :, None]
        mask = torch.cat([prefix.pad_mask[:, None, :].expand(-1, n, -1), own], dim=2)[:, None]
        positions = prefix.pad_mask.sum(-1, keepdim=True) + torch.arange(n, device=x.device)
        expert = self.core.paligemma_with_expert.gemma_expert.model
        past = prefix.keys_values
        hidden, _ = run_layers(expert, x, positions, mask, past, condition, self.checkpointing, self._layer)
        with full(self.device, self.precision):
            return self.core.action_out_proj(hidden[:, -self.action_horizon :].float())


def _keep_float32(module: nn.Module) -> None:
    """Run a module outside autocast."""
    inner = module.forward

    def forward(*args, **kwargs):
        with full(next(module.parameters()).device, "bfloat16"):
            return inner(*args, **kwargs)

    module.forward = forward
