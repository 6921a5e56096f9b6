"""Low-rank adapters (LoRA, Hu et al., 2106.09685) in a library's modules, by PEFT.

pi0.trainable and groot.trainable say which layers get them; policies.saving merges them for an export.
"""

from __future__ import annotations

from torch import nn


def put_adapters(module: nn.Module, targets: str, rank: int) -> None:
    """Adapters, which start as no change, beside every layer whose name is `targets` (a regular expression).

    Raises ValueError when PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("policy.train=lora needs the package peft: pip install peft") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), module)
