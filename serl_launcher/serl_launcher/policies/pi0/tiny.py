"""The real PI0 and PI0.5 classes at a size that learns on one CPU core (0.25M parameters), built offline in a second.

`policy=pi0_tiny` names `TinySize`, `policy=pi05_tiny` names `TinyPI05Size`. lerobot's configuration admits only Gemma
300M and 2B, so the module's `get_gemma_config` and the two model classes are replaced for the length of the
construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from serl_launcher.policies.pi0.full import lerobot_config, library
from serl_launcher.policies.tokens import StateWordTokenizer, WordHashTokenizer
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class TinySize:
    """Widths and depths of a tiny PI0; calling it builds the core."""

    kind: ClassVar[str] = "pi0"
    width: int = 64  # of the language model and of the action expert
    depth: int = 2  # layers of each
    head_dim: int = 8  # 8 heads, one key-value head (fixed by lerobot)
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    image_size: int = 64  # pixels, square
    patch_size: int = 16
    prompt_tokens: int = 4
    conv_stem: bool = True  # strided convolutions in place of the linear patch embedding: learns from fewer images
    expert_width: int | None = None  # None: as the language model
    vocabulary: int = 32  # token ids; the last one is PaliGemma's image token

    def __call__(self, spec: TaskSpec, action_horizon: int) -> tuple[nn.Module, WordHashTokenizer]:
        """The core for a task's cameras, state and action dimensions, and its tokenizer."""
        words = self.tokenizer(spec)
        return self.build(self.config(spec, action_horizon)), words

    def tokenizer(self, spec: TaskSpec) -> WordHashTokenizer:
        """Hashed words."""
        return WordHashTokenizer(self.vocabulary, self.prompt_tokens)

    def build(self, config: Any) -> nn.Module:
        """lerobot's model at this size for a lerobot config, randomly initialised."""
        module, _, core_class = library(self.kind)
        with shrunk(module, self):
            core = core_class(config)
        spread(core)
        if self.conv_stem:
            embeddings = core.paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings
            embeddings.patch_embedding = ConvStem(self.patch_size, self.vision_width)
        return core

    def config(self, spec: TaskSpec, action_horizon: int) -> Any:
        """lerobot's configuration for a task."""
        dims = dict(max_state_dim=len(spec.state_names), max_action_dim=len(spec.action_names))
        side, tokens = self.image_size, self.prompt_tokens
        return lerobot_config(self.kind, spec, action_horizon, side, tokenizer_max_length=tokens, **dims)


@dataclass(frozen=True, slots=True)
class TinyPI05Size(TinySize):
    """Widths and depths of a tiny PI0.5; the prompt must hold the task's words and one token per state dim."""

    kind: ClassVar[str] = "pi05"
    vocabulary: int = 512
    prompt_tokens: int = 32

    def tokenizer(self, spec: TaskSpec) -> StateWordTokenizer:
        """Hashed words, and the state's bins. Raises ValueError when the prompt does not hold them."""
        needed = len(spec.prompt.split()) + len(spec.state_names) + 3
        if needed > self.prompt_tokens:
            raise ValueError(
                f"policy.size.prompt_tokens: expected at least {needed} (the prompt's words and the state), "
                f"got {self.prompt_tokens}"
            )
        return StateWordTokenizer(self.vocabulary, self.prompt_tokens)


class ConvStem(nn.Sequential):
    """log2(patch) strided 3 × 3 convolutions: the same token grid as a patch embedding (Xiao et al., 2106.14881)."""

    def __init__(self, patch_size: int, width: int, hidden: int = 24) -> None:
        n = int(math.log2(patch_size))
        if 2**n != patch_size:
            raise ValueError(f"policy.size.patch_size: a convolutional stem needs a power of two, got {patch_size}")
        channels = [3] + [hidden] * (n - 1) + [width]
        layers: list[nn.Module] = []
        for k in range(n):
            layers += [nn.Conv2d(channels[k], channels[k + 1], 3, stride=2, padding=1), nn.SiLU()]
        super().__init__(*layers[:-1])

    @property
    def weight(self):
        """SigLIP reads the dtype of its patch embedding's weight."""
        return self[0].weight


@contextmanager
def shrunk(pi0, size: TinySize) -> Iterator[None]:
    """lerobot's PI0 or PI0.5 module with tiny Gemma configurations and a tiny SigLIP, restored on leaving."""
    names = ("get_gemma_config", "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    saved = {name: getattr(pi0, name) for name in names}

    def gemma(variant: str):
        width = size.width if variant == "gemma_2b" else size.expert_width or size.width
        return pi0.GemmaConfig(width, size.depth, 2 * width, 8, 1, size.head_dim)

    def vlm(config):
        config._vocab_size, config.image_token_index = size.vocabulary, size.vocabulary - 1
        config.projection_dim = size.width
        text, vision = config.text_config, config.vision_config
        text.vocab_size, text.pad_token_id = size.vocabulary, 0
        vision.hidden_size, vision.intermediate_size = size.vision_width, 2 * size.vision_width
        vision.num_hidden_layers, vision.num_attention_heads = size.vision_layers, size.vision_heads
        vision.patch_size, vision.projection_dim = size.patch_size, size.width
        return saved[names[1]](config=config)

    def expert(config):
        config.vocab_size, config.pad_token_id = 1, 0
        return saved[names[2]](config=config)

    for name, replacement in zip(names, (gemma, vlm, expert), strict=True):
        setattr(pi0, name, replacement)
    try:
        yield
    finally:
        for name, original in saved.items():
            setattr(pi0, name, original)


def spread(core: nn.Module) -> None:
    """Fan-in initialisation, and PI0.5's gates open. The library's std of 0.02 suits width 2048; at width 64 signals
    would vanish."""
    backbone = core.paligemma_with_expert
    for root in (backbone.paligemma.model.language_model, backbone.gemma_expert.model):
        for name, module in root.named_modules():
            if isinstance(module, nn.Linear):
                residual = 0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, std=residual * module.in_features**-0.5)
        if getattr(root, "embed_tokens", None) is not None:
            nn.init.normal_(root.embed_tokens.weight, std=0.5)
    for module in backbone.paligemma.model.multi_modal_projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for module in backbone.gemma_expert.modules():
        if getattr(module, "cond_dim", None) is not None:
            _open_gate(module)


@torch.no_grad()
def _open_gate(norm: nn.Module) -> None:
    """Start every residual branch open: scale 0, shift 0, gate 1, and a weak dependence on time."""
    nn.init.normal_(norm.dense.weight, std=0.1 * norm.cond_dim**-0.5)
    norm.dense.bias.zero_()
    norm.dense.bias[2 * norm.dim :] = 1.0
