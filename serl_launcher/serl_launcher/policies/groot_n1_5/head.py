"""GR00T N1.5 behind the flow-policy interface; groot_n1_5.build makes it.

It is N1.7's policy (groot.head) over another backbone, with learned tokens between state and actions and one
cross-attention over pictures and text alike. Time runs as ours does (t = 0 is noise), in buckets of a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from serl_launcher.policies.groot.head import GrootFlowPolicy, GrootPrefix
from serl_launcher.policies.groot.qwen import text_layer
from serl_launcher.policies.groot_n1_5.checkpoint import ALIASES
from serl_launcher.policies.groot_n1_5.eagle import run_eagle, siglip_layer
from serl_launcher.policies.groot_n1_5.saving import save_groot_n1_5


class EagleFlowPolicy(GrootFlowPolicy):
    """What N1.5 and N1.6 share: an Eagle before the action head, run by our own layers alone."""

    backbone_functions: ClassVar[tuple[Callable, ...]] = (siglip_layer, text_layer)

    @staticmethod
    def drop_unread(core: nn.Module) -> None:
        """Nothing: `EagleModel` is built without it."""

    def compile_layers(self, mode: str, backend: str = "inductor") -> None:
        if self.attention != "sdpa":
            raise ValueError("policy.attention: GR00T N1.5 and N1.6 have our own layers alone, set it to sdpa")
        super().compile_layers(mode, backend)

    def dead_parameters(self) -> set[str]:
        """None: what no action depends on is not held."""
        return set()

    @property
    def image_token(self) -> int:
        return self.backbone.image_token


class GrootN15FlowPolicy(EagleFlowPolicy):
    """`N15Core` as a flow policy; arguments as `GrootFlowPolicy`. inputs: groot_n1_5.inputs. `attention` is sdpa."""

    aliases: ClassVar[dict[str, str]] = ALIASES

    @property
    def vision_layers(self) -> nn.ModuleList:
        return self.backbone.eagle_model.vision_model.vision_model.encoder.layers

    @property
    def language_layers(self) -> nn.ModuleList:
        return self.backbone.eagle_model.language_model.model.layers

    def save(self, folder: Path, extras: Mapping[str, Any] | None = None) -> Path:
        """Write it in NVIDIA's layout, or in LeRobot's where it came from one; `extras` as `save_groot_n1_5`."""
        return save_groot_n1_5(self, folder, extras)

    def _run_backbone(self, tensors: dict[str, Tensor], keep: Tensor) -> Tensor:
        backbone = self.backbone
        given = (tensors["input_ids"], keep, tensors["pixel_values"], backbone.image_token, self._dtype)
        seen = run_eagle(backbone.eagle_model, *given, self.checkpointing, *self._backbone_layers)
        return backbone.eagle_linear(seen)

    def leading_tokens(self, prefix: GrootPrefix) -> tuple[Tensor, ...]:
        future = self.core.action_head.future_tokens.weight
        return prefix.state_features, future.to(prefix.state_features.dtype).expand(len(prefix), -1, -1)
