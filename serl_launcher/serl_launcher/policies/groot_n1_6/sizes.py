"""GR00T N1.6 at the size of its release (3.0B parameters that are read) and tiny, `policy=groot_n1_6` and `…_tiny`.

For random weights and, on the meta device, for the costs that tools/preflight.py counts; a checkpoint brings its own
configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from serl_launcher.policies.groot.inputs import SpecialTokens
from serl_launcher.policies.groot.tiny import spread_weights, transformer
from serl_launcher.policies.groot_n1_6.core import RELEASED, RELEASED_EAGLE, N16Config, N16Core
from serl_launcher.policies.groot_n1_6.inputs import UNIT, Eagle3HashInputs
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class FullN16Size:
    """The released architecture."""

    hashed: ClassVar[bool] = False  # whether a checkpoint of this size goes without a tokenizer
    image_size: int = 252  # pixels: 256, to the nearest multiple of 28
    prompt_tokens: int = 32

    def inputs(self, cameras: tuple[str, ...]) -> Eagle3HashInputs:
        """Tensors of the released shapes without the backbone's tokenizer."""
        tokens = SpecialTokens(151669, 151670, 151671, 151643)
        return Eagle3HashInputs(cameras, self.image_size, self.prompt_tokens, tokens)

    def build(self, config: N16Config) -> N16Core:
        """The model, randomly initialised."""
        return N16Core(config)

    def config_fields(self, spec: TaskSpec, action_horizon: int) -> N16Config:
        """The release's, with another chunk."""
        return N16Config.of(RELEASED | {"action_horizon": action_horizon})


@dataclass(frozen=True, slots=True)
class TinyN16Size:
    """Widths and depths of a tiny GR00T N1.6: the same modules, 0.7M parameters, built offline."""

    hashed: ClassVar[bool] = True
    width: int = 64  # of the language model; 4 heads
    layers: int = 2  # of the language model that are read; one more is configured, as in the release
    vision_width: int = 32
    vision_layers: int = 2
    head_width: int = 64  # of the action head; 4 heads
    head_layers: int = 4
    image_size: int = 56  # pixels, square, a multiple of 28
    prompt_tokens: int = 6
    vocabulary: int = 64
    max_state_dim: int | None = None  # None: the task's
    max_action_dim: int | None = None
    embodiments: int = 12
    state_dropout: float = 0.0  # above 0: there is a token for a state that is left out

    def inputs(self, cameras: tuple[str, ...]) -> Eagle3HashInputs:
        """What prepares the backbone's tensors; the three ids below the end are Eagle's special tokens."""
        v = self.vocabulary
        return Eagle3HashInputs(cameras, self.image_size, self.prompt_tokens, SpecialTokens(v - 1, v - 2, v - 3, v - 3))

    def build(self, config: N16Config) -> N16Core:
        """The model, randomly initialised so that signals of this width do not vanish."""
        core = N16Core(config)
        spread_weights(core, core.backbone.model.language_model.model.embed_tokens)
        return core

    def config_fields(self, spec: TaskSpec, action_horizon: int) -> N16Config:
        """As a checkpoint's config.json and its backbone's."""
        if self.image_size % UNIT:
            raise ValueError(f"policy.size.image_size: expected a multiple of {UNIT}, got {self.image_size}")
        head = self.head_width
        fields = RELEASED | dict(
            model_name="backbone",
            backbone_embedding_dim=self.width,
            select_layer=self.layers,
            max_state_dim=self.max_state_dim or len(spec.state_names),
            max_action_dim=self.max_action_dim or len(spec.action_names),
            action_horizon=action_horizon,
            hidden_size=head,
            input_embedding_dim=head,
            max_num_embodiments=self.embodiments,
            max_seq_len=64,
            diffusion_model_cfg=transformer(self.head_layers, head)
            | dict(norm_type="ada_norm", output_dim=head, interleave_self_attention=True),
            state_dropout_prob=self.state_dropout,
        )
        return N16Config.of(fields, self.eagle_fields())

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
            num_patches=9,  # not the pictures' number, as in the release
        )
        return {
            **RELEASED_EAGLE,
            "image_token_index": self.vocabulary - 1,
            "text_config": RELEASED_EAGLE["text_config"] | text,
            "vision_config": RELEASED_EAGLE["vision_config"] | vision,
        }
