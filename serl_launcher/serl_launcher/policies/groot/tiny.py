"""The real GR00T N1.7 classes at tiny size, built offline in a second; `policy=groot_tiny` names `TinyGrootSize`.

The library takes its backbone's shape from a folder with a Qwen3-VL config, written here for the construction.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from serl_launcher.policies.groot.inputs import MERGE, PATCH, Geometry, HashInputs, SpecialTokens
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class TinyGrootSize:
    """Widths and depths of a tiny GR00T N1.7; calling it builds the core."""

    hashed: ClassVar[bool] = True  # whether a checkpoint of this size goes without tokenizer and image processor
    width: int = 64  # of the language model; 4 heads
    layers: int = 2  # of the language model that are kept
    vision_width: int = 32
    vision_layers: int = 2
    head_width: int = 64  # of the action head; 4 heads
    head_layers: int = 4
    image_size: int = 64  # pixels, square, a multiple of 32
    prompt_tokens: int = 6
    vocabulary: int = 64
    max_state_dim: int | None = None  # None: the task's
    max_action_dim: int | None = None
    embodiments: int = 4

    def __call__(self, spec: TaskSpec, action_horizon: int) -> tuple[nn.Module, HashInputs]:
        """The core (`GR00TN17`, float32, random) for a task, and what prepares its inputs."""
        return self.build(self.config_fields(spec, action_horizon)), self.inputs(tuple(spec.cameras))

    def inputs(self, cameras: tuple[str, ...]) -> HashInputs:
        """What prepares the backbone's tensors; the four ids below the end are Qwen's special tokens."""
        v = self.vocabulary
        return HashInputs(cameras, self.image_size, self.prompt_tokens, SpecialTokens(v - 1, v - 3, v - 4, v - 4))

    def geometry(self) -> Geometry:
        """Of a policy that starts at random with a real processor."""
        return Geometry(target=(self.image_size, self.image_size), crop=None)

    def build(self, fields: dict[str, Any]) -> nn.Module:
        """`GR00TN17` with the given configuration and this size's backbone."""
        from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

        with tempfile.TemporaryDirectory() as parent:
            folder = f"{parent}/Qwen/Qwen3-VL"  # lerobot knows the kind of a backbone by its name, and warns of others
            self.backbone_config().save_pretrained(folder)
            core = GR00TN17(GR00TN17Config(**{**fields, "model_name": folder}), load_backbone_weights=False).float()
        spread_weights(core, core.backbone.language_model.embed_tokens)
        return core

    def config_fields(self, spec: TaskSpec, action_horizon: int) -> dict[str, Any]:
        """The fields of `GR00TN17Config` that differ from the full model's."""
        if self.image_size % (PATCH * MERGE):
            raise ValueError(f"policy.size.image_size: expected a multiple of {PATCH * MERGE}, got {self.image_size}")
        head = self.head_width
        return dict(
            backbone_model_type="qwen",
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
            vl_self_attention_cfg=transformer(1, self.width),
            load_bf16=False,
            use_flash_attention=False,
        )

    def backbone_config(self) -> Any:
        """A Qwen3-VL config of this size."""
        from transformers import Qwen3VLConfig

        v, heads = self.vocabulary, 4
        return Qwen3VLConfig(
            image_token_id=v - 1,
            video_token_id=v - 2,
            vision_start_token_id=v - 3,
            vision_end_token_id=v - 4,
            tie_word_embeddings=True,
            text_config=dict(
                attention_bias=False,
                head_dim=self.width // heads,
                hidden_size=self.width,
                intermediate_size=2 * self.width,
                num_attention_heads=heads,
                num_key_value_heads=2,
                num_hidden_layers=self.layers + 1,
                vocab_size=v,
                max_position_embeddings=4096,
                rms_norm_eps=1e-6,
                rope_scaling=dict(
                    mrope_interleaved=True, mrope_section=_sections(self.width // heads), rope_type="default"
                ),
                rope_theta=5e6,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
            ),
            vision_config=dict(
                # One per layer but the last: what is added after it, the action head does not see.
                deepstack_visual_indexes=list(range(min(self.vision_layers, self.layers - 1))),
                depth=self.vision_layers,
                hidden_size=self.vision_width,
                intermediate_size=2 * self.vision_width,
                num_heads=4,
                num_position_embeddings=(self.image_size // PATCH) ** 2,
                out_hidden_size=self.width,
                patch_size=PATCH,
                spatial_merge_size=MERGE,
                temporal_patch_size=2,
                in_channels=3,
            ),
        )


def transformer(layers: int, width: int) -> dict[str, Any]:
    """The configuration of a transformer of the action head: 4 heads."""
    shape = dict(num_layers=layers, num_attention_heads=4, attention_head_dim=width // 4)
    return dict(positional_embeddings=None, dropout=0.2, final_dropout=True, **shape)


def _sections(head_dim: int) -> list[int]:
    """Rotary channels of time, height, width: half a head in total."""
    side = 3 * head_dim // 16
    return [head_dim // 2 - 2 * side, side, side]


def spread_weights(core: nn.Module, embedding: nn.Embedding) -> None:
    """Fan-in initialisation of backbone and projections: the library's std of 0.02 suits width 2048, signals would
    vanish here."""
    for module in core.backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    nn.init.normal_(embedding.weight, std=0.5)
    for module in core.action_head.modules():
        if type(module).__name__ == "CategorySpecificLinear":
            nn.init.normal_(module.W, std=module.W.shape[1] ** -0.5)
