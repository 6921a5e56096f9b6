"""What of a policy trains, what is frozen and what no action depends on, part by part, as a table.

The trainer, examples/train_sft.py and tools/preflight.py print it before anything is trained.
"""

from __future__ import annotations

from torch import nn

PARTS = {  # what a parameter's name contains -> its part, the first that fits; none: action projections
    "lora_": "LoRA adapters",
    "steering.": "noise policy",
    "chooser.": "critics that choose",
    "vision_tower": "vision tower",
    "multi_modal_projector": "projector",
    ".visual.": "vision tower",
    "eagle_model.vision_model.": "vision tower",
    "eagle_model.mlp1": "projector",
    "eagle_linear": "projector",
    "backbone.model.vision_model.": "vision tower",
    "backbone.model.mlp1": "projector",
    "language_model": "language model",
    "gemma_expert": "action expert",
    "action_head.model.": "diffusion transformer",
    "action_head.vl": "vision-language attention",
    "action_head": "embodiment projections",
}


def parameter_table(policy: nn.Module) -> str:
    """The table. Trainable: numbers that the optimizer moves; frozen: read, never moved; dead: no action depends on
    them, the features of critics at most; MB: of memory that the weights take."""
    dead = policy.dead_parameters() if hasattr(policy, "dead_parameters") else set()
    rows: dict[str, list[int]] = {}
    for name, parameter in policy.named_parameters():
        part = next((label for key, label in PARTS.items() if key in name), "action projections")
        row = rows.setdefault(part, [0, 0, 0, 0])
        row[2 if name in dead else 0 if parameter.requires_grad else 1] += parameter.numel()
        row[3] += parameter.numel() * parameter.element_size()
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"{'part':<26}{'trainable':>14}{'frozen':>14}{'dead':>14}{'MB':>10}"]
    for part, (trainable, frozen, unread, size) in rows.items():
        lines.append(f"{part:<26}{trainable:>14,}{frozen:>14,}{unread:>14,}{size / 1e6:>10,.1f}")
    return "\n".join(lines)
