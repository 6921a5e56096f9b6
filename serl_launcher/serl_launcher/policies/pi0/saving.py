"""A policy as a folder that LeRobot itself loads: config.json, model.safetensors, processors with their statistics.

tools/export_checkpoint.py calls the head's `save` with a run's published parameters.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serl_launcher.policies.checkpoint import PREPROCESSOR
from serl_launcher.policies.normalise import Affine
from serl_launcher.policies.pi0.checkpoint import ALIASES, EMBEDDING, EXPERT_HEAD, said_tokenizer
from serl_launcher.policies.saving import copy_beside, new_folder, tensors_to_save, write_model
from serl_launcher.tensor_files import Pending

PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"


def save_pi0(policy: nn.Module, folder: Path) -> Path:
    """Write a PI0 or PI0.5 policy; the folder must not exist or be empty. Raises ValueError otherwise."""
    folder, source = Path(folder), getattr(policy, "checkpoint", None)
    tensors = tensors_to_save(policy, "model.", ALIASES)
    if source is None:
        tensors |= {f"model.{name}": tensor for name, tensor in language_heads(policy.core).items()}
    with new_folder(folder) as part:
        if source is None:
            write_config(policy, part)
        else:
            copy_beside(source.folder, part, ("tokenizer",))
            if getattr(policy, "new_units", False):  # a base that went on to another robot
                for path in part.glob("policy_*processor*"):
                    path.unlink()
                write_config(policy, part)
        write_model(tensors, part)
    return folder


def language_heads(core: nn.Module) -> dict[str, Pending]:
    """What LeRobot's loader wants and no flow policy reads: PaliGemma's is tied to its embedding, the expert's zero."""
    config = core.paligemma_with_expert.gemma_expert.config
    shape = (config.vocab_size, config.hidden_size)
    zeros = Pending(torch.float32, shape, partial(torch.zeros, shape))
    return {ALIASES[EMBEDDING]: Pending.of(core.get_parameter(EMBEDDING)), EXPERT_HEAD: zeros}


def write_config(policy: nn.Module, folder: Path) -> None:
    """config.json and processors of a policy with units of its own: they become the statistics."""
    config = policy.core.config
    config._save_pretrained(folder)
    source = getattr(policy, "checkpoint", None)
    named = getattr(policy.tokenizer, "source", PALIGEMMA_TOKENIZER)
    tokenizer = named if source is None else said_tokenizer(source) or named
    statistics = {"observation.state": _statistics(policy.state_units), "action": _statistics(policy.action_units)}
    before, after = _processors(config, statistics)
    before.save_pretrained(folder)
    after.save_pretrained(folder)
    path = folder / PREPROCESSOR
    content = json.loads(path.read_text())
    for step in content["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = tokenizer
    path.write_text(json.dumps(content, indent=2))


def _statistics(units: Affine) -> dict[str, Tensor]:
    """The map under every mode's names: mean ± std, or a range whose ends are −1 and 1."""
    offset, scale = units.offset.cpu(), units.scale.cpu()
    low, high = offset - scale, offset + scale
    return {"mean": offset, "std": scale, "min": low, "max": high, "q01": low, "q99": high}


def _processors(config: Any, statistics: dict[str, dict[str, Tensor]]) -> tuple[Any, Any]:
    """lerobot's pipelines for a config, without fetching its tokenizer (only its name is saved)."""
    import lerobot.policies.pi0.processor_pi0 as pi0
    import lerobot.policies.pi05.processor_pi05 as pi05

    module, make = (
        (pi0, pi0.make_pi0_pre_post_processors) if config.type == "pi0" else (pi05, pi05.make_pi05_pre_post_processors)
    )
    original = module.TokenizerProcessorStep

    def unfetched(**fields: Any) -> Any:
        return original(**{**fields, "tokenizer_name": None, "tokenizer": object()})

    module.TokenizerProcessorStep = unfetched
    try:
        return make(config, dataset_stats=statistics)
    finally:
        module.TokenizerProcessorStep = original
