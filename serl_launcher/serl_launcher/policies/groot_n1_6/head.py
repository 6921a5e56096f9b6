"""GR00T N1.6 behind the flow-policy interface; groot_n1_6.build makes it.

It is N1.7's policy (groot.head) over another backbone: the action head differs by a self-attention that N1.6 lacks, and
by a learned token in place of a state that is left out (`dropout`). Time runs as ours does (t = 0 is noise), in buckets
of a thousandth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from serl_launcher.policies.groot_n1_5.head import EagleFlowPolicy
from serl_launcher.policies.groot_n1_6.core import ALIASES, TYPE
from serl_launcher.policies.groot_n1_6.eagle import run_eagle3


class GrootN16FlowPolicy(EagleFlowPolicy):
    """`N16Core` as a flow policy; arguments as `GrootFlowPolicy`. inputs: groot_n1_6.inputs. `attention` is sdpa."""

    aliases: ClassVar[dict[str, str]] = ALIASES

    def tune(self, llm: bool, visual: bool, projector: bool, diffusion_model: bool, vlln: bool) -> None:
        """As N1.7's; the token of a state that is left out trains with the projector."""
        super().tune(llm, visual, projector, diffusion_model, vlln)
        if self._mask_token is not None:
            self._mask_token.requires_grad_(projector and self.dropout)

    def dead_parameters(self) -> set[str]:
        """The token of a state that is left out, where none is; what else no action depends on is not held."""
        return set() if self._mask_token is None or self.dropout else {"core.action_head.mask_token"}

    @property
    def _mask_token(self) -> nn.Parameter | None:
        return getattr(self.core.action_head, "mask_token", None)

    @property
    def vision_layers(self) -> nn.ModuleList:
        return self.backbone.model.vision_model.vision_model.encoder.layers

    @property
    def language_layers(self) -> nn.ModuleList:
        return self.backbone.model.language_model.model.layers

    def write_config(self, folder: Path) -> None:
        """config.json, and the backbone's in backbone/, of a policy that began at random."""
        config = self.core.config
        said = {**config.fields, "model_type": TYPE, "architectures": [TYPE], "model_name": "backbone"}
        (folder / "config.json").write_text(json.dumps(said, indent=2))
        (folder / "backbone").mkdir()
        (folder / "backbone" / "config.json").write_text(json.dumps(config.eagle, indent=2))

    def _run_backbone(self, tensors: dict[str, Tensor], keep: Tensor) -> Tensor:
        views = [tensors[f"pixel_values_{k}"] for k in range(len(self.cameras))]
        given = (tensors["input_ids"], keep, views, self.image_token, self._dtype)
        return run_eagle3(self.backbone.model, *given, self.checkpointing, *self._backbone_layers)

    def _drop_states(self, features: Tensor) -> Tensor:
        p = self.core.action_head.state_dropout_prob
        if not (self.training and self.dropout and p > 0):
            return features
        dropped = torch.rand(len(features), 1, 1, device=features.device) < p
        return torch.where(dropped, self._mask_token.to(features.dtype), features)
