"""PI0 behind the flow-policy interface, over lerobot's own modules with our own forward path.

Built from yaml by the trainer, the policy server and a local policy (`build_pi0`). Why not lerobot's `forward`: it
ignores the pad mask, runs the backbone again for every noise sample, and `from_pretrained` keeps random weights where
a tensor is missing. Time runs backwards there (τ = 1 is noise, velocity = noise − action); converted here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.base import PolicyInput, Prefix
from serl_launcher.policies.normalise import Affine
from serl_transport.specs import TaskSpec

Tokenizer = Callable[[list[str]], tuple[Tensor, Tensor]]


class PI0FlowPolicy(nn.Module):
    """lerobot's `PI0Pytorch` as a flow policy: encode once, then velocity as often as wanted."""

    def __init__(self, core: nn.Module, spec: TaskSpec, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.core = core
        self.tokenizer = tokenizer
        self.cameras = tuple(spec.cameras)
        self.image_size: int = core.config.image_resolution[0]
        self.action_horizon: int = core.config.chunk_size
        self.action_dim = len(spec.action_names)
        self.state_units = Affine.from_bounds(spec.state_low, spec.state_high)
        self.action_units = Affine.from_bounds(spec.action_low, spec.action_high)
        self._freeze_dead_weights()

    def _freeze_dead_weights(self) -> None:
        """The language heads are never read by a flow policy: no gradient, no optimizer state, not published."""
        for head in (
            self.core.paligemma_with_expert.paligemma.lm_head,
            self.core.paligemma_with_expert.gemma_expert.lm_head,
        ):
            tied = {id(p) for p in self.core.paligemma_with_expert.paligemma.model.parameters()}
            for parameter in head.parameters():
                if id(parameter) not in tied:
                    parameter.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.state_units.offset.device

    def encode(self, observation: PolicyInput) -> Prefix:
        """One pass of SigLIP over all cameras and of the language model over image and prompt tokens."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        b, backbone = len(observation), self.core.paligemma_with_expert
        images = backbone.embed_image(self._pixels(observation.images))  # cameras·b, l_image, width
        images = torch.cat(images.split(b), dim=1)
        ids, mask = (x.to(self.device) for x in self.tokenizer(observation.prompts))
        embeddings = torch.cat([images, backbone.embed_language_tokens(ids)], dim=1)
        pad_mask = torch.cat([torch.ones(images.shape[:2], dtype=torch.bool, device=self.device), mask], dim=1)
        attention = make_att_2d_masks(pad_mask, torch.zeros_like(pad_mask))
        backbone.paligemma.model.language_model.config._attn_implementation = "eager"
        (hidden, _), cache = backbone.forward(
            attention_mask=prepare_attention_masks_4d(attention),
            position_ids=torch.cumsum(pad_mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        state = self.state_units.to_model(torch.as_tensor(observation.state, device=self.device))
        return Prefix([(layer[0], layer[1]) for layer in cache], pad_mask, hidden, state)

    def _pixels(self, images: dict[str, np.ndarray]) -> Tensor:
        """uint8[b, h, w, 3] per camera to float32[cameras·b, 3, size, size] in [−1, 1], camera-major."""
        stacked = torch.as_tensor(np.concatenate([images[camera] for camera in self.cameras])).to(self.device)
        pixels = stacked.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            from lerobot.policies.common.vla_utils import resize_with_pad_torch

            pixels = resize_with_pad_torch(pixels, self.image_size, self.image_size)
        return pixels

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache(tuple((keys, values, None) for keys, values in prefix.keys_values))
        return -self.core.denoise_step(prefix.state, prefix.pad_mask, cache, x_t, 1 - t)

    def features(self, prefix: Prefix) -> Tensor:
        """Mean of the last hidden states over the tokens that count, with the state beside it."""
        keep = prefix.pad_mask.unsqueeze(-1).to(prefix.hidden.dtype)
        pooled = (prefix.hidden * keep).sum(1) / keep.sum(1)
        return torch.cat([pooled.float(), prefix.state], dim=-1)

    def normalise_actions(self, chunk: Tensor) -> Tensor:
        return self.action_units.to_model(chunk)

    def physical_actions(self, chunk: Tensor) -> Tensor:
        return self.action_units.to_physical(chunk.clamp(-1, 1))


def build_pi0(name: str, spec: TaskSpec, init: str, seed: int, action_horizon: int, size: Callable) -> PI0FlowPolicy:
    """A PI0 policy for one task. `init: random` is the only start there is without a checkpoint, and must be asked for.

    size: builds the core and its tokenizer, `size(spec, action_horizon) -> (core, tokenizer)`.
    Raises ValueError for an `init` that is not known.
    """
    if init != "random":
        raise ValueError(
            f"policy.init: expected 'random' (weights of a checkpoint come by checkpoint_path), got {init!r}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core, tokenizer = size(spec, action_horizon)
    return PI0FlowPolicy(core, spec, tokenizer)
