"""A policy as a folder that LeRobot itself loads: config.json, model.safetensors, processors with their statistics.

tools/export_checkpoint.py calls the head's `save` with a run's published parameters. What was not trained is copied
from the checkpoint that the policy came from, byte for byte, and so are config and processors.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from serl_launcher.policies.checkpoint import PREPROCESSOR, SINGLE, Checkpoint, copy_beside, expect_new
from serl_launcher.policies.normalise import Affine
from serl_launcher.policies.pi0.checkpoint import ALIASES, EMBEDDING, EXPERT_HEAD
from serl_launcher.policies.pi0.trainable import merged_state

PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"


def save_pi0(policy: nn.Module, folder: Path) -> Path:
    """Write a PI0 or PI0.5 policy; the folder must not exist or be empty. Raises ValueError otherwise."""
    folder = Path(folder)
    expect_new(folder)
    source: Checkpoint | None = getattr(policy, "checkpoint", None)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors_to_save(policy, source), part / SINGLE, metadata={"format": "pt"})
    if source is None:
        _write_config(policy, part)
    else:
        copy_beside(source.folder, part, ("tokenizer",))
    if folder.exists():
        folder.rmdir()
    os.replace(part, folder)
    return folder


def tensors_to_save(policy: nn.Module, source: Checkpoint | None) -> dict[str, Tensor]:
    """Every tensor under its name in the file: trained ones as they are, the others as the source holds them."""
    mine = {f"model.{name}": tensor for name, tensor in merged_state(policy.core).items()}
    if source is None:
        mine |= {f"model.{name}": tensor for name, tensor in _language_heads(policy.core).items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in mine.items()}
    trained = {f"model.{name.removeprefix('core.')}" for name in trained_names(policy)}
    out: dict[str, Tensor] = {}
    for stored in source.files:
        name = stored if stored.startswith("model.") else f"model.{stored}"
        held = name if name in mine else _alias(name, source)
        out[stored] = mine[held].detach().cpu().contiguous() if held in trained else source.tensor(stored)
    return out


def trained_names(policy: nn.Module) -> set[str]:
    """Names of the weights that training moved; an adapter moves the weight below it."""
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    below = {name.split(".lora_")[0] + ".weight" for name in names if ".lora_" in name}
    return {name for name in names if ".lora_" not in name} | below


def _alias(name: str, source: Checkpoint) -> str:
    """The name that the policy holds a tensor under, where the file keeps a tied one under its other name only."""
    for held, other in ALIASES.items():
        if name == f"model.{other}" and not {held, f"model.{held}"} & source.files.keys():
            return f"model.{held}"
    return name


def _language_heads(core: nn.Module) -> dict[str, Tensor]:
    """What LeRobot's loader wants and no flow policy reads: PaliGemma's is tied to its embedding, the expert's zero."""
    embedding = dict(core.named_parameters())[EMBEDDING]
    config = core.paligemma_with_expert.gemma_expert.config
    return {ALIASES[EMBEDDING]: embedding.clone(), EXPERT_HEAD: torch.zeros(config.vocab_size, config.hidden_size)}


def _write_config(policy: nn.Module, folder: Path) -> None:
    """config.json and processors of a policy that began at random: its units become the statistics."""
    config = policy.core.config
    config._save_pretrained(folder)
    tokenizer = getattr(policy.tokenizer, "source", PALIGEMMA_TOKENIZER)
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
