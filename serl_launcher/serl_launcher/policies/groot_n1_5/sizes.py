"""GR00T N1.5 at the size of its release (2.4B parameters that are read) and tiny, `policy=groot_n1_5` and `…_tiny`.

For random weights and, on the meta device, for the costs that tools/preflight.py counts; a checkpoint brings its own
configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from serl_launcher.policies.groot.inputs import SpecialTokens
from serl_launcher.policies.groot.tiny import spread_weights, transformer
from serl_launcher.policies.groot_n1_5.core import RELEASED, RELEASED_EAGLE, N15Config, N15Core
from serl_launcher.policies.groot_n1_5.inputs import EagleHashInputs
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class FullN15Size:
    """The released architecture."""

    hashed: ClassVar[bool] = False  # whether a checkpoint of this size goes without a tokenizer
    prompt_tokens: int = 32

    def inputs(self, cameras: tuple[str, ...]) -> EagleHashInputs:
        """Tensors of the released shapes without the backbone's tokenizer."""
        return EagleHashInputs(cameras, 224, self.prompt_tokens, SpecialTokens(151669, 151670, 151671, 151643))

    def build(self, config: N15Config) -> N15Core:
        """The model, randomly initialised."""
        return N15Core(config)

    def config_fields(self, spec: TaskSpec, action_horizon: int) -> N15Config:
        """The release's, with another chunk."""
        head = {**RELEASED["action_head_cfg"], "action_horizon": action_horizon}
        return N15Config.of({**RELEASED, "action_horizon": action_horizon, "action_head_cfg": head}, None)


@dataclass(frozen=True, slots=True)
class TinyN15Size:
    """Widths and depths of a tiny GR00T N1.5: the same modules, 1.1M parameters, built offline."""

    hashed: ClassVar[bool] = True
    width: int = 64  # of the language model; 4 heads
    layers: int = 2  # of the language model that are read; one more is configured, as in the release
    vision_width: int = 32
    vision_layers: int = 2
    head_width: int = 64  # of the action head; 4 heads
    head_layers: int = 4
    future_tokens: int = 4
    image_size: int = 56  # pixels, square, a multiple of 14
    prompt_tokens: int = 6
    vocabulary: int = 64
    max_state_dim: int | None = None  # None: the task's
    max_action_dim: int | None = None
    embodiments: int = 32

    def inputs(self, cameras: tuple[str, ...]) -> EagleHashInputs:
        """What prepares the backbone's tensors; the three ids below the end are Eagle's special tokens."""
        v = self.vocabulary
        return EagleHashInputs(cameras, self.image_size, self.prompt_tokens, SpecialTokens(v - 1, v - 2, v - 3, v - 3))

    def build(self, config: N15Config) -> N15Core:
        """The model, randomly initialised so that signals of this width do not vanish."""
        core = N15Core(config)
        spread_weights(core, core.backbone.eagle_model.language_model.model.embed_tokens)
        return core

    def config_fields(self, spec: TaskSpec, action_horizon: int) -> N15Config:
        """As a checkpoint's config.json and its backbone's."""
        if self.image_size % 14:
            raise ValueError(f"policy.size.image_size: expected a multiple of 14, got {self.image_size}")
        dims, head = self.max_action_dim or len(spec.action_names), self.head_width
        cross = transformer(self.head_layers, head) | {"cross_attention_dim": self.width, "output_dim": head}
        fields = {
            **RELEASED,
            "action_horizon": action_horizon,
            "action_dim": dims,
            "hidden_size": self.width,
            "backbone_cfg": {**RELEASED["backbone_cfg"], "select_layer": self.layers},
            "action_head_cfg": {
                **RELEASED["action_head_cfg"],
                "action_dim": dims,
                "action_horizon": action_horizon,
                "backbone_embedding_dim": self.width,
                "diffusion_model_cfg": cross | {"interleave_self_attention": True, "norm_type": "ada_norm"},
                "hidden_size": head,
                "input_embedding_dim": head,
                "max_action_dim": dims,
                "max_state_dim": self.max_state_dim or len(spec.state_names),
                "max_num_embodiments": self.embodiments,
                "max_seq_len": 64,
                "num_target_vision_tokens": self.future_tokens,
                "vl_self_attention_cfg": transformer(1, self.width),
            },
        }
        return N15Config.of(fields, self.eagle_fields())

    def eagle_fields(self) -> dict[str, Any]:
        """The backbone's configuration."""
        heads = 4
        text = dict(
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_attention_heads=heads,
            num_key_value_heads=2,
            head_dim=self.width // heads,
            num_hidden_layers=self.layers + 1,
            vocab_size=self.vocabulary,
        )
        vision = dict(
            hidden_size=self.vision_width,
            intermediate_size=2 * self.vision_width,
            num_attention_heads=heads,
            num_hidden_layers=self.vision_layers,
            image_size=self.image_size,
        )
        return {
            **RELEASED_EAGLE,
            "image_token_index": self.vocabulary - 1,
            "text_config": RELEASED_EAGLE["text_config"] | text,
            "vision_config": RELEASED_EAGLE["vision_config"] | vision,
        }
