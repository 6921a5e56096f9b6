"""What of a policy trains, what is frozen and what no action depends on, part by part, as a table.

The trainer, examples/train_sft.py and tools/preflight.py print it before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Group:
    """A part of a policy in the table."""

    name: str
    trainable: int  # numbers that the optimizer moves
    frozen: int  # read, never moved
    dead: int  # no action depends on them: the features of critics at most
    bytes: int  # of memory that the weights take


PARTS = {  # what a parameter's name contains -> its part; the first that fits counts
    "lora_": "LoRA adapters",
    "steering.": "noise policy",
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
    """Parameters by part of the model; what matches none of PARTS is "action projections"."""
    dead = policy.dead_parameters() if hasattr(policy, "dead_parameters") else set()
    counts: dict[str, list[int]] = {}
    for name, parameter in policy.named_parameters():
        part = next((label for key, label in PARTS.items() if key in name), "action projections")
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
