"""PI0 and PI0.5 at the size of their released checkpoints (3.5B parameters); `policy=pi0` and `policy=pi05` name it.

`build` runs on the meta device when a checkpoint fills the weights, so that nothing is initialised in vain.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from serl_launcher.policies.tokens import HubTokenizer, WordHashTokenizer
from serl_transport.contract.specs import TaskSpec

PADDED = 32  # dims of state and action in every released checkpoint
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}


@dataclass(frozen=True, slots=True)
class FullSize:
    """The released architecture of a kind, `pi0` or `pi05`."""

    kind: str
    tokenizer: str | None = None  # folder or hub name, for random weights; None hashes words

    def __call__(self, spec: TaskSpec, action_horizon: int) -> tuple[nn.Module, HubTokenizer | WordHashTokenizer]:
        """A randomly initialised core and a tokenizer."""
        config = self.config(spec, action_horizon)
        length = config.tokenizer_max_length
        words = HubTokenizer(self.tokenizer, length) if self.tokenizer else WordHashTokenizer(257152, length)
        return self.build(config), words

    def build(self, config) -> nn.Module:
        """`PI0Pytorch` or `PI05Pytorch` for a lerobot config."""
        if self.kind == "pi0":
            from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch as Core
        else:
            from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch as Core
        return Core(config)

    def config(self, spec: TaskSpec, action_horizon: int):
        """lerobot's default configuration for a task's cameras, state and actions."""
        from lerobot.configs import FeatureType, PolicyFeature
        from lerobot.policies.pi0.configuration_pi0 import PI0Config
        from lerobot.policies.pi05.configuration_pi05 import PI05Config

        if self.kind not in PROMPT_TOKENS:
            raise ValueError(f"policy.size.kind: expected one of {list(PROMPT_TOKENS)}, got {self.kind!r}")
        images = {f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for c in spec.cameras}
        state = {"observation.state": PolicyFeature(FeatureType.STATE, (len(spec.state_names),))}
        return {"pi0": PI0Config, "pi05": PI05Config}[self.kind](
            chunk_size=action_horizon,
            n_action_steps=action_horizon,
            max_action_dim=PADDED,
            max_state_dim=PADDED,
            tokenizer_max_length=PROMPT_TOKENS[self.kind],
            device="cpu",
            dtype="float32",
            input_features={**images, **state},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (len(spec.action_names),))},
        )
