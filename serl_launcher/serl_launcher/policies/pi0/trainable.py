"""What of a PI0 or PI0.5 trains: all of it, the action expert alone, or low-rank adapters (LoRA).

pi0.build calls both functions with `policy.train` of the yaml.
"""

from __future__ import annotations

from torch import nn

from serl_launcher.policies.adapters import put_adapters

MODES = ("full", "expert", "lora")
LORA_TARGETS = r".*\.self_attn\.(q|k|v|o)_proj|.*\.mlp\.(gate|up|down)_proj"


def freeze(policy: nn.Module, mode: str) -> None:
    """Set requires_grad for all but adapters: all of it (full), only the action expert and its projections (expert), or
    only the action projections (lora). Before weights are read, so that what is frozen is never held in fp32.

    Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"policy.train: expected one of {list(MODES)}, got {mode!r}")
    if mode != "full":
        policy.backbone.requires_grad_(False)
    if mode == "lora":
        policy.core.paligemma_with_expert.gemma_expert.requires_grad_(False)


def set_trainable(policy: nn.Module, mode: str, lora_rank: int = 16) -> None:
    """As `freeze`, and LoRA adapters on every attention and MLP projection where the mode is lora.

    Raises ValueError for an unknown mode, or when PEFT is not installed.
    """
    freeze(policy, mode)
    if mode == "lora":
        put_adapters(policy.core.paligemma_with_expert, LORA_TARGETS, lora_rank)
