"""PI0 and PI0.5 at the size of their released checkpoints (3.5B parameters); `policy=pi0` and `policy=pi05` name it.

`build` runs on the meta device when a checkpoint fills the weights, so that nothing is initialised in vain.
`library` and `lerobot_config` serve the tiny sizes (pi0.tiny) too.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from serl_launcher.policies.tokens import WordHashTokenizer
from serl_transport.contract.specs import TaskSpec

PADDED = 32  # dims of state and action in every released checkpoint
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}


def library(kind: str) -> tuple[ModuleType, type, type[nn.Module]]:
    """lerobot's module of a kind, its configuration and its model. Raises ValueError for an unknown kind."""
    if kind == "pi0":
        import lerobot.policies.pi0.modeling_pi0 as pi0

        return pi0, pi0.PI0Config, pi0.PI0Pytorch
    if kind == "pi05":
        import lerobot.policies.pi05.modeling_pi05 as pi05

        return pi05, pi05.PI05Config, pi05.PI05Pytorch
    raise ValueError(f"policy.size.kind: expected one of {list(PROMPT_TOKENS)}, got {kind!r}")


def lerobot_config(kind: str, spec: TaskSpec, action_horizon: int, image_side: int, **fields: Any) -> Any:
    """lerobot's configuration for a task's cameras, state and actions; images are square."""
    from lerobot.configs import FeatureType, PolicyFeature

    picture = PolicyFeature(FeatureType.VISUAL, (3, image_side, image_side))
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (len(spec.state_names),))}
    return library(kind)[1](
        chunk_size=action_horizon,
        n_action_steps=action_horizon,
        image_resolution=(image_side, image_side),
        device="cpu",
        dtype="float32",
        input_features={f"observation.images.{camera}": picture for camera in spec.cameras} | state,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(spec.action_names),))},
        **fields,
    )


@dataclass(frozen=True, slots=True)
class FullSize:
    """The released architecture of a kind, `pi0` or `pi05`."""

    kind: str

    def __call__(self, spec: TaskSpec, action_horizon: int) -> tuple[nn.Module, WordHashTokenizer]:
        """A randomly initialised core, and hashed words."""
        config = self.config(spec, action_horizon)
        return self.build(config), WordHashTokenizer(257152, config.tokenizer_max_length)

    def build(self, config: Any) -> nn.Module:
        """`PI0Pytorch` or `PI05Pytorch` for a lerobot config."""
        return library(self.kind)[2](config)

    def config(self, spec: TaskSpec, action_horizon: int) -> Any:
        """lerobot's default configuration for a task."""
        fields = dict(max_action_dim=PADDED, max_state_dim=PADDED, tokenizer_max_length=PROMPT_TOKENS.get(self.kind))
        return lerobot_config(self.kind, spec, action_horizon, 224, **fields)
