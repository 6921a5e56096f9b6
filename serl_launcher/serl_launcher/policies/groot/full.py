"""GR00T N1.7 at the size of its release (3.1B parameters); `policy=groot_n1_7` names `FullGrootSize`.

Used for random weights and, on the meta device, for the costs that tools/preflight.py counts; a checkpoint brings its
own configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from serl_launcher.policies.groot.inputs import Geometry, HashInputs, SpecialTokens
from serl_transport.contract.specs import TaskSpec

TOKENS = SpecialTokens(image=151655, start=151652, end=151653, words=151643)


@dataclass(frozen=True, slots=True)
class FullGrootSize:
    """The released architecture: ViT of 407M, language model of 16 layers and 1.1B, action head of 1.6B parameters."""

    hashed: ClassVar[bool] = False  # whether a checkpoint of this size goes without tokenizer and image processor
    image_size: int = 256  # pixels of the pictures that hashed prompts go with
    prompt_tokens: int = 32

    def __call__(self, spec: TaskSpec, action_horizon: int) -> tuple[nn.Module, HashInputs]:
        """A randomly initialised core, and hashed prompts."""
        return self.build(self.config_fields(spec, action_horizon)), self.inputs(tuple(spec.cameras))

    def inputs(self, cameras: tuple[str, ...]) -> HashInputs:
        """Tensors of the released shapes without the backbone's tokenizer."""
        return HashInputs(cameras, self.image_size, self.prompt_tokens, TOKENS)

    def geometry(self) -> Geometry:
        """Of a policy that starts at random with a real processor."""
        return Geometry()

    def build(self, fields: dict[str, Any]) -> nn.Module:
        """`GR00TN17` of the released configuration, changed by `fields`."""
        from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

        return GR00TN17(GR00TN17Config(**fields), load_backbone_weights=False).float()

    def config_fields(self, spec: TaskSpec, action_horizon: int) -> dict[str, Any]:
        """What differs from the release: nothing but the chunk."""
        return {"action_horizon": action_horizon, "load_bf16": False}
