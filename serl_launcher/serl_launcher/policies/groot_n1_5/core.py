"""The modules of GR00T N1.5 under the names that its checkpoints have: no current library builds it.

    backbone.eagle_model   SigLIP ─▶ mlp1 ─▶ image tokens ┐
                           prompt ─▶ embedding ───────────┴▶ the first 12 layers of Qwen3 ─▶ norm ─▶ eagle_linear
    action_head            state, 32 future tokens, noisy actions ─▶ diffusion transformer over the backbone's tokens

groot_n1_5.checkpoint and the sizes build it, groot_n1_5.head runs it. The transformers are lerobot's of N1.7, which has
the same ones; SigLIP and Qwen3 are transformers'. What no action depends on (SigLIP's pooling head, the language head,
the language layers above) is not built. Facts: Isaac-GR00T n1.5, gr00t/model/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

RELEASED_EAGLE: dict[str, Any] = {  # what every N1.5 checkpoint has behind its `eagle_path`
    "image_token_index": 151669,
    "mlp_connector_layers": 1,
    "select_layer": -1,
    "use_pixel_shuffle": False,
    "text_config": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=28,
        vocab_size=151680,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    "vision_config": dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        num_hidden_layers=27,
        image_size=224,
        patch_size=14,
        layer_norm_eps=1e-6,
    ),
}
RELEASED: dict[str, Any] = {  # nvidia/GR00T-N1.5-3B's config.json, as far as it shapes the model
    "model_type": "gr00t_n1_5",
    "architectures": ["GR00T_N1_5"],
    "action_horizon": 16,
    "action_dim": 32,
    "compute_dtype": "bfloat16",
    "hidden_size": 2048,
    "backbone_cfg": {
        "eagle_path": "NVEagle/eagle_er-qwen3_1_7B-Siglip2_400M_stage1_5_128gpu_er_v7_1mlp_nops",
        "project_to_dim": None,
        "reproject_vision": False,
        "select_layer": 12,
    },
    "action_head_cfg": {
        "action_dim": 32,
        "action_horizon": 16,
        "add_pos_embed": True,
        "backbone_embedding_dim": 2048,
        "diffusion_model_cfg": dict(
            attention_head_dim=48,
            cross_attention_dim=2048,
            dropout=0.2,
            final_dropout=True,
            interleave_self_attention=True,
            norm_type="ada_norm",
            num_attention_heads=32,
            num_layers=16,
            output_dim=1024,
            positional_embeddings=None,
        ),
        "hidden_size": 1024,
        "input_embedding_dim": 1536,
        "max_action_dim": 32,
        "max_state_dim": 64,
        "num_inference_timesteps": 4,
        "num_target_vision_tokens": 32,
        "num_timestep_buckets": 1000,
        "use_vlln": True,
        "vl_self_attention_cfg": dict(
            attention_head_dim=64,
            dropout=0.2,
            final_dropout=True,
            num_attention_heads=32,
            num_layers=4,
            positional_embeddings=None,
        ),
    },
}


@dataclass(frozen=True, slots=True)
class N15Config:
    """What the policy reads of a model's configuration."""

    fields: Mapping[str, Any]  # config.json
    eagle: Mapping[str, Any]  # the backbone's
    action_horizon: int
    max_action_dim: int
    max_state_dim: int
    max_num_embodiments: int
    add_pos_embed: bool
    use_alternate_vl_dit: bool = False
    state_history_length: int = 1

    @staticmethod
    def of(fields: Mapping[str, Any], eagle: Mapping[str, Any] | None) -> N15Config:
        """eagle: None, the released backbone. ValueError naming a key that is absent or a backbone of another kind."""
        head, eagle = fields.get("action_head_cfg"), eagle or RELEASED_EAGLE
        if not isinstance(head, Mapping) or not isinstance(fields.get("backbone_cfg"), Mapping):
            raise ValueError("expected backbone_cfg and action_head_cfg in a GR00T N1.5's config.json")
        kind = (eagle.get("mlp_connector_layers"), eagle.get("use_pixel_shuffle"), eagle.get("select_layer"))
        if kind != (1, False, -1):
            raise ValueError(f"Eagle of one linear connector without pixel shuffle is read, got {kind}")
        if fields["backbone_cfg"].get("reproject_vision"):
            raise ValueError("backbone_cfg.reproject_vision: only false is read")
        needed = ("action_horizon", "action_dim", "max_state_dim", "hidden_size", "input_embedding_dim")
        if absent := [key for key in needed if key not in head]:
            raise ValueError(f"no action_head_cfg.{absent[0]} in a GR00T N1.5's config.json")
        return N15Config(
            fields,
            eagle,
            head["action_horizon"],
            head["action_dim"],
            head["max_state_dim"],
            head.get("max_num_embodiments", 32),
            head.get("add_pos_embed", True),
        )


class N15Core(nn.Module):
    """`backbone` and `action_head`."""

    def __init__(self, config: N15Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = EagleBackbone(config)
        self.action_head = N15ActionHead(config)


class EagleModel(nn.Module):
    """SigLIP, the connector and the layers of Qwen3 that are read; groot_n1_5.eagle runs them."""

    def __init__(self, eagle: Mapping[str, Any], layers: int) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

        vision = SiglipVisionConfig(**{"hidden_act": "gelu_pytorch_tanh", **eagle["vision_config"]})
        vision.vision_use_head = False
        text = Qwen3Config(**{**eagle["text_config"], "num_hidden_layers": layers, "use_cache": False})
        self.vision_model = SiglipVisionModel(vision)
        self.mlp1 = nn.Sequential(nn.Linear(vision.hidden_size, text.hidden_size))
        self.language_model = nn.Module()
        self.language_model.model = Qwen3Model(text)


class EagleBackbone(nn.Module):
    """Eagle and, where the configuration has one, a projection of its tokens."""

    def __init__(self, config: N15Config) -> None:
        super().__init__()
        given, text = config.fields["backbone_cfg"], config.eagle["text_config"]
        self.image_token: int = config.eagle["image_token_index"]
        self.eagle_model = EagleModel(config.eagle, given.get("select_layer", 12))
        to = given.get("project_to_dim", 1536)  # the stock default where the key is absent; the release has null
        self.eagle_linear = nn.Identity() if to is None else nn.Linear(text["hidden_size"], to)

    def set_trainable_parameters(self, tune_llm: bool, tune_visual: bool) -> None:
        """GR00T's two flags; the projection follows neither and trains with either."""
        model = self.eagle_model
        self.requires_grad_(tune_llm or tune_visual)
        model.language_model.requires_grad_(tune_llm)
        for module in (model.vision_model, model.mlp1):
            module.requires_grad_(tune_visual)


class N15ActionHead(nn.Module):
    """The flow head's modules; groot_n1_5.head runs them."""

    state_dropout_prob = 0.0  # N1.7's, which N1.5 lacks

    def __init__(self, config: N15Config) -> None:
        super().__init__()
        from lerobot.policies.groot.action_head.cross_attention_dit import DiT, SelfAttentionTransformer
        from lerobot.policies.groot.groot_n1_7 import CategorySpecificMLP, MultiEmbodimentActionEncoder

        given, slots = config.fields["action_head_cfg"], config.max_num_embodiments
        hidden, width = given["hidden_size"], given["input_embedding_dim"]
        self.config = config
        self.num_timestep_buckets: int = given.get("num_timestep_buckets", 1000)
        self.model = DiT(**given["diffusion_model_cfg"])
        self.state_encoder = CategorySpecificMLP(slots, config.max_state_dim, hidden, width)
        self.action_encoder = MultiEmbodimentActionEncoder(config.max_action_dim, width, slots)
        self.action_decoder = CategorySpecificMLP(slots, hidden, hidden, config.max_action_dim)
        self.future_tokens = nn.Embedding(given.get("num_target_vision_tokens", 32), width)
        nn.init.normal_(self.future_tokens.weight, std=0.02)
        with_norm = given.get("use_vlln", True)
        self.vlln = nn.LayerNorm(given.get("backbone_embedding_dim", 1536)) if with_norm else nn.Identity()
        attend = SelfAttentionTransformer(**given["vl_self_attention_cfg"]) if with_norm else nn.Identity()
        self.vl_self_attention = attend
        if config.add_pos_embed:
            self.position_embedding = nn.Embedding(given.get("max_seq_len", 1024), width)
            nn.init.normal_(self.position_embedding.weight, std=0.02)

    def set_trainable_parameters(self, tune_projector: bool, tune_diffusion_model: bool, tune_vlln: bool) -> None:
        """GR00T's flags, and `tune_vlln` for norm and self-attention before the head, which N1.5 always trains; the
        future tokens train with any of them."""
        self.requires_grad_(tune_projector or tune_diffusion_model or tune_vlln)
        for module in (self.state_encoder, self.action_encoder, self.action_decoder):
            module.requires_grad_(tune_projector)
        if self.config.add_pos_embed:
            self.position_embedding.requires_grad_(tune_projector)
        self.model.requires_grad_(tune_diffusion_model)
        for module in (self.vlln, self.vl_self_attention):
            module.requires_grad_(tune_vlln)
