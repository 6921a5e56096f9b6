"""The real PI0.5 classes at tiny size, built offline in a second; `policy=pi05_tiny` names `TinyPI05Size`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from serl_launcher.policies.pi0.tiny import TinySize, shrunk, spread
from serl_launcher.policies.tokens import StateWordTokenizer
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class TinyPI05Size(TinySize):
    """Widths and depths of a tiny PI0.5; the prompt must hold the task's words and one token per state dim."""

    vocabulary: int = 512
    prompt_tokens: int = 32

    def __call__(self, spec: TaskSpec, action_horizon: int) -> tuple[nn.Module, StateWordTokenizer]:
        """The core (`PI05Pytorch`) for a task's cameras, state and action dimensions, and its tokenizer."""
        needed = len(spec.prompt.split()) + len(spec.state_names) + 3
        if needed > self.prompt_tokens:
            raise ValueError(
                f"policy.size.prompt_tokens: expected at least {needed} (the prompt's words and the state), "
                f"got {self.prompt_tokens}"
            )
        core = self.build(self.config(spec, action_horizon))
        return core, StateWordTokenizer(self.vocabulary, self.prompt_tokens)

    def build(self, config) -> nn.Module:
        """`PI05Pytorch` at this size for a lerobot config, randomly initialised."""
        import lerobot.policies.pi05.modeling_pi05 as pi05

        with shrunk(pi05, self):
            core = pi05.PI05Pytorch(config)
        spread(core)
        for module in core.paligemma_with_expert.gemma_expert.modules():
            if getattr(module, "cond_dim", None) is not None:
                _open_gate(module)
        self.replace_stem(core)
        return core

    def config(self, spec: TaskSpec, action_horizon: int):
        """lerobot's `PI05Config` for a task."""
        from lerobot.policies.pi05.configuration_pi05 import PI05Config

        return PI05Config(**self.config_fields(spec, action_horizon))


@torch.no_grad()
def _open_gate(norm: nn.Module) -> None:
    """Start every residual branch open: scale 0, shift 0, gate 1, and a weak dependence on time."""
    nn.init.normal_(norm.dense.weight, std=0.1 * norm.cond_dim**-0.5)
    norm.dense.bias.zero_()
    norm.dense.bias[2 * norm.dim :] = 1.0
