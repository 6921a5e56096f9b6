"""In which numbers a policy is held and computed: bf16 compute over fp32 masters, or fp32 throughout.

What trains is held in fp32 (an optimizer step of 1e-5 vanishes in bf16's 8 bits); what is frozen is held in bf16,
except vectors (norms, biases) and SigLIP's embeddings. The forward pass runs under autocast; the action projections
and the flow's arithmetic stay in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from serl_launcher.policies.shapes_only import ShapeRules

PRECISIONS = ("float32", "bfloat16")
FLOAT32 = (
    *("vision_model.embeddings", "action_in_proj", "action_out_proj", "time_mlp", "state_proj"),
    *("action_head.action_decoder", "action_head.action_encoder", "action_head.state_encoder"),
)


def check_precision(precision: str) -> str:
    """The value itself. Raises ValueError for one that is not known."""
    if precision not in PRECISIONS:
        raise ValueError(f"policy.precision: expected one of {list(PRECISIONS)}, got {precision!r}")
    return precision


def stays_float32(name: str, ndim: int) -> bool:
    """Is a tensor held in fp32 even where it is frozen or only served?"""
    # What an algorithm adds beside the flow runs outside autocast, on features in fp32.
    return ndim < 2 or name.startswith(("steering.", "chooser.")) or any(part in name for part in FLOAT32)


def compute(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass."""
    if device.type == "meta":
        return ShapeRules(half=precision == "bfloat16")
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def full(device: torch.device, precision: str) -> AbstractContextManager:
    """Inside `compute`: fp32 arithmetic for a part of the pass."""
    if device.type == "meta":
        return ShapeRules(half=False)
    return torch.autocast(device.type, enabled=False) if precision == "bfloat16" else nullcontext()


@torch.no_grad()
def hold(policy: nn.Module, precision: str, masters: bool) -> None:
    """Cast a policy's matrices: to bf16 where they only serve, with `masters` only those that do not train."""
    if precision != "bfloat16":
        return
    for name, parameter in policy.named_parameters():
        if not stays_float32(name, parameter.ndim) and not (masters and parameter.requires_grad):
            parameter.data = parameter.data.to(torch.bfloat16)
