"""What of a policy trains, and a table that says so before training starts.

The builders call `choose` with `train:` of the yaml; the trainer prints `parameter_table`. `frozen_hash` before and
after shows that frozen tensors were not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

MODES = ("full", "expert", "lora")
LORA_TARGETS = r".*\.self_attn\.(q|k|v|o)_proj|.*\.mlp\.(gate|up|down)_proj"


def choose(policy: nn.Module, mode: str, lora_rank: int = 16) -> None:
    """Set requires_grad of a PI0 or PI0.5: all of it, only the action expert and its projections, or LoRA adapters on
    every attention and MLP projection beside fully trained action projections.

    Raises ValueError for an unknown mode, or when PEFT is not installed.
    """
    if mode not in MODES:
        raise ValueError(f"policy.train: expected one of {list(MODES)}, got {mode!r}")
    if mode != "full":
        policy.backbone.requires_grad_(False)
    if mode == "lora":
        policy.core.paligemma_with_expert.gemma_expert.requires_grad_(False)
        add_lora(policy.core.paligemma_with_expert, lora_rank)
    dead = policy.dead_parameters()
    for name, parameter in policy.named_parameters():
        if "lm_head" in name and name in dead:
            parameter.requires_grad_(False)


def add_lora(module: nn.Module, rank: int) -> None:
    """Low-rank adapters (Hu et al., 2106.09685) in place, by PEFT; they start as no change."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("policy.train=lora needs the package peft: pip install peft") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), module)


@dataclass(frozen=True, slots=True)
class Group:
    """A part of a policy in the table."""

    name: str
    trainable: int  # numbers that the optimizer moves
    frozen: int  # read, never moved
    dead: int  # held, never read by a flow output
    bytes: int  # of memory that the weights take


PARTS = {
    "vision_tower": "vision tower",
    "multi_modal_projector": "projector",
    ".visual.": "vision tower",
    "language_model": "language model",
    "gemma_expert": "action expert",
    "action_head.model.": "diffusion transformer",
    "action_head.vl": "vision-language attention",
    "action_head": "embodiment projections",
}


def groups(policy: nn.Module) -> list[Group]:
    """Parameters by part of the model, in the order of PARTS; what matches none is "action projections"."""
    dead = policy.dead_parameters() if hasattr(policy, "dead_parameters") else set()
    counts: dict[str, list[int]] = {}
    for name, parameter in policy.named_parameters():
        part = next((label for key, label in PARTS.items() if key in name), "action projections")
        if "lora_" in name:
            part = "LoRA adapters"
        row = counts.setdefault(part, [0, 0, 0, 0])
        row[2 if name in dead else 0 if parameter.requires_grad else 1] += parameter.numel()
        row[3] += parameter.numel() * parameter.element_size()
    return [Group(part, *row) for part, row in counts.items()]


def parameter_table(policy: nn.Module) -> str:
    """What trains, what is frozen and what is dead, part by part, as text."""
    rows = groups(policy)
    total = Group("total", *(sum(getattr(r, f) for r in rows) for f in ("trainable", "frozen", "dead", "bytes")))
    lines = [f"{'part':<26}{'trainable':>14}{'frozen':>14}{'dead':>14}{'MB':>10}"]
    for row in [*rows, total]:
        lines.append(f"{row.name:<26}{row.trainable:>14,}{row.frozen:>14,}{row.dead:>14,}{row.bytes / 1e6:>10,.1f}")
    return "\n".join(lines)


def frozen_hash(policy: nn.Module, names: Iterable[str] | None = None) -> str:
    """SHA-256 over the values of the parameters that do not train (or of the named ones)."""
    wanted = None if names is None else set(names)
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if (name in wanted) if wanted is not None else not parameter.requires_grad:
            raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()


def merged_state(core: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict under the names of a model without adapters: W + scale · B·A where LoRA was put in."""
    out: dict[str, torch.Tensor] = {}
    modules = dict(core.named_modules())
    for name, tensor in core.state_dict().items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            layer = modules[name.split(".base_layer.")[0]]
            if name.endswith("base_layer.weight"):
                tensor = tensor.float() + layer.get_delta_weight("default").to(tensor.device)
            name = name.replace(".base_layer.", ".")
        out[name] = tensor
    return out
