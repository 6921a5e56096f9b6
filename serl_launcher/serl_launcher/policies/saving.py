"""What every head does to write a checkpoint folder: the tensors under the file's names, and the files beside them.

pi0.saving and groot.saving call it. What was not trained is copied from the checkpoint that the policy came from
(`policy.checkpoint`), byte for byte.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor, nn

from serl_launcher.policies.checkpoint import Checkpoint


def tensors_to_save(policy: nn.Module, prefix: str, aliases: dict[str, str]) -> dict[str, Tensor]:
    """Every tensor under its name in the file: trained ones as they are, the others as the source holds them.

    prefix: of the names in the file; aliases: name -> another name that the file may use for the same tensor. A file
    that has both gets the trained one under both.
    """
    source: Checkpoint | None = getattr(policy, "checkpoint", None)
    held = merged_state(policy.core)
    if source is None:
        return {prefix + name: _on_host(tensor) for name, tensor in held.items()}
    trained = {name.removeprefix("core.") for name in trained_names(policy)}
    names = {stored: stored.removeprefix(prefix) for stored in source.files}
    tied = {other: name for name, other in aliases.items() if name in trained or name not in names.values()}
    mine = {stored: tied.get(name, name) for stored, name in names.items()}
    out = {s: _on_host(held[name]) if name in trained else source.tensor(s) for s, name in mine.items()}
    # A file that has both names gets two copies: safetensors refuses tensors that share memory.
    return {s: tensor.clone() if mine[s] != names[s] else tensor for s, tensor in out.items()}


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def merged_state(core: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names of a model without adapters: W + scale · B·A where LoRA was put in."""
    out: dict[str, Tensor] = {}
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


def trained_names(policy: nn.Module) -> set[str]:
    """Names of the weights that training moved; an adapter moves the weight below it."""
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    below = {name.split(".lora_")[0] + ".weight" for name in names if ".lora_" in name}
    return {name for name in names if ".lora_" not in name} | below


def expect_new(folder: Path) -> None:
    """Raise ValueError when a folder to write a checkpoint to holds files."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files already; name a folder that does not exist")


def copy_beside(source: Path, folder: Path, folders: tuple[str, ...]) -> None:
    """Everything beside the weights, unchanged: configs, processors, statistics, tokenizer, the named folders."""
    for path in source.iterdir():
        weights = path.name.startswith(("model.", "model-", "action_head_"))
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja") and not weights:
            shutil.copyfile(path, folder / path.name)
    for name in folders:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
