"""The modules of GR00T N1.6 under the names that its checkpoints have: no current library builds it.

    backbone.model   SigLIP 2 ─▶ 2 × 2 patches ─▶ mlp1 ─▶ image tokens ┐
                     prompt ─▶ embedding ────────────────────────────┴▶ the first 16 layers of Qwen3 ─▶ norm
    action_head      N1.7's without its self-attention over the backbone's tokens; a token for a state that is left out

groot_n1_6.build and the sizes build it, groot_n1_6.head runs it. The action head is lerobot's of N1.7; SigLIP 2 and
Qwen3 are transformers'. What no action depends on (the pooling head, the language head, the language layers above) is
not built. Facts: Isaac-GR00T n1.6, gr00t/model/gr00t_n1d6, gr00t/configs/model/gr00t_n1d6.py, Eagle-Block2A-2B-v2.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError
from serl_launcher.policies.groot_n1_5.core import RELEASED_EAGLE as EAGLE_OF_N1_5

TYPE = "Gr00tN1d6"
_LANGUAGE = "backbone.model.language_model."
ALIASES = {f"{_LANGUAGE}model.embed_tokens.weight": f"{_LANGUAGE}lm_head.weight"}
POOLING = "backbone.model.vision_model.vision_model.head."  # SigLIP's, which no action depends on
SLOTS = {  # EMBODIMENT_TAG_TO_PROJECTOR_INDEX, of tags that an embodiment_id.json does not list
    "robocasa_panda_omron": 13,
    "gr1": 20,
    "behavior_r1_pro": 24,
    "unitree_g1": 8,
    "libero_panda": 2,
    "oxe_google": 0,
    "oxe_widowx": 1,
    "oxe_droid": 16,
    "new_embodiment": 10,
}
RELEASED_EAGLE: dict[str, Any] = {  # Eagle-Block2A-2B-v2, the one backbone that N1.6 is released with
    "image_token_index": 151669,
    "mlp_connector_layers": 2,
    "select_layer": -1,
    "use_pixel_shuffle": True,
    "downsample_ratio": 0.5,
    "text_config": EAGLE_OF_N1_5["text_config"],
    "vision_config": dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        num_hidden_layers=27,
        num_patches=256,
        patch_size=14,
        layer_norm_eps=1e-6,
        use_rope=False,
        use_windows_attn=False,
    ),
}
DEFAULTS: dict[str, Any] = {  # of a key that a config.json lacks, as far as it shapes the model
    "model_name": "nvidia/Eagle-Block2A-2B-v2",
    "backbone_model_type": "eagle",
    "backbone_embedding_dim": 2048,
    "select_layer": 16,
    "reproject_vision": False,
    "max_state_dim": 29,
    "max_action_dim": 29,
    "action_horizon": 16,
    "hidden_size": 1024,
    "input_embedding_dim": 1536,
    "add_pos_embed": True,
    "use_vlln": True,
    "max_seq_len": 1024,
    "use_alternate_vl_dit": True,
    "attend_text_every_n_blocks": 2,
    "diffusion_model_cfg": dict(
        positional_embeddings=None,
        num_layers=32,
        num_attention_heads=32,
        attention_head_dim=48,
        norm_type="ada_norm",
        dropout=0.2,
        final_dropout=True,
        output_dim=1024,
        interleave_self_attention=True,
    ),
    "num_inference_timesteps": 4,
    "noise_beta_alpha": 1.5,
    "noise_beta_beta": 1.0,
    "noise_s": 0.999,
    "num_timestep_buckets": 1000,
    "state_dropout_prob": 0.0,
    "max_num_embodiments": 32,
}
RELEASED = DEFAULTS | {"max_state_dim": 128, "max_action_dim": 128, "action_horizon": 50}  # nvidia/GR00T-N1.6-3B


@dataclass(frozen=True, slots=True)
class N16Config:
    """A config.json with the defaults of what it lacks, its keys as attributes, and the backbone's."""

    fields: Mapping[str, Any]
    eagle: Mapping[str, Any]

    @staticmethod
    def of(fields: Mapping[str, Any], eagle: Mapping[str, Any] | None = None) -> N16Config:
        """eagle: None, the released backbone. ValueError naming what another kind of model has."""
        fields, eagle = DEFAULTS | dict(fields), eagle or RELEASED_EAGLE
        vision = eagle["vision_config"]
        kind = {key: eagle.get(key) for key in ("mlp_connector_layers", "downsample_ratio", "select_layer")}
        kind |= {key: vision.get(key) for key in ("use_rope", "use_windows_attn")}
        wanted = dict(
            mlp_connector_layers=2, downsample_ratio=0.5, select_layer=-1, use_rope=False, use_windows_attn=False
        )
        if other := {key: value for key, value in kind.items() if value != wanted[key]}:
            raise ValueError(f"Eagle of {wanted} is read, got {other}")
        if fields["reproject_vision"]:
            raise ValueError("reproject_vision: only false is read")
        # What N1.7's action head has beside, and N1.6's lacks; nothing here trains by these three flags.
        fields |= {"vl_self_attention_cfg": None, "state_history_length": 1}
        fields |= dict.fromkeys(("tune_projector", "tune_diffusion_model", "tune_vlln"), True)
        return N16Config(fields, eagle)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None


def build_core(found: Checkpoint) -> N16Core:
    """The model of a checkpoint's configuration on the meta device, its backbone's in backbone/ where that is not the
    release's. Raises CheckpointError."""
    found.expect_type(TYPE)
    eagle = found.folder / "backbone" / "config.json"
    name = found.config.get("model_name", DEFAULTS["model_name"])
    if not eagle.is_file() and name != DEFAULTS["model_name"]:
        raise CheckpointError(f"{found.folder}: backbone {name!r} and no backbone/config.json beside it")
    try:
        config = N16Config.of(found.config, json.loads(eagle.read_text()) if eagle.is_file() else None)
    except ValueError as error:
        raise CheckpointError(f"{found.folder}: {error}") from None
    with torch.device("meta"):
        return N16Core(config)


class N16Core(nn.Module):
    """`backbone` and `action_head`."""

    def __init__(self, config: N16Config) -> None:
        super().__init__()
        from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead

        self.config = config
        self.backbone = EagleBackbone(config)
        self.action_head = GR00TN17ActionHead(config)
        if config.state_dropout_prob > 0:
            self.action_head.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, config.input_embedding_dim))


class EagleBackbone(nn.Module):
    """Eagle 3 as far as an action depends on it; groot_n1_6.eagle runs it."""

    def __init__(self, config: N16Config) -> None:
        super().__init__()
        self.image_token: int = config.eagle["image_token_index"]
        self.model = EagleModel(config.eagle, config.select_layer)

    def set_trainable_parameters(self, tune_llm: bool, tune_visual: bool) -> None:
        """GR00T's two flags."""
        self.model.language_model.requires_grad_(tune_llm)
        for module in (self.model.vision_model, self.model.mlp1):
            module.requires_grad_(tune_visual)


class EagleModel(nn.Module):
    """SigLIP 2, the connector and the layers of Qwen3 that are read."""

    def __init__(self, eagle: Mapping[str, Any], layers: int) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel

        known = inspect.signature(Siglip2VisionConfig).parameters
        given = {key: value for key, value in eagle["vision_config"].items() if key in known and "dtype" not in key}
        vision = Siglip2VisionConfig(**{"hidden_act": "gelu_pytorch_tanh", **given})
        vision.vision_use_head = False
        text = {key: value for key, value in eagle["text_config"].items() if "dtype" not in key and key[0] != "_"}
        text = Qwen3Config(**{**text, "num_hidden_layers": layers, "layer_types": None, "use_cache": False})
        self.vision_model = Siglip2VisionModel(vision)
        merged = vision.hidden_size * 4  # 2 × 2 patches
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged),
            nn.Linear(merged, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.language_model = nn.Module()
        self.language_model.model = Qwen3Model(text)
