"""What every head does to write a checkpoint folder: the tensors under the file's names, and the files beside them.

pi0.saving and groot.saving call it. What was not trained is copied from the checkpoint that the policy came from
(`policy.checkpoint`), byte for byte, a tensor at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serl_launcher.policies.checkpoint import INDEX, SINGLE, Checkpoint
from serl_launcher.tensor_files import Pending, write_tensors

FORMAT = {"format": "pt"}  # metadata of a file of weights
SHARD = 5 * 10**9  # bytes of a file, where a release has several


def tensors_to_save(policy: nn.Module, prefix: str, aliases: dict[str, str]) -> dict[str, Pending]:
    """Every tensor under its name in the file: trained ones as they are, the others as the source holds them.

    prefix: of the names in the file; aliases: name -> another name that the file may use for the same tensor. A file
    that has both gets the trained one under both.
    """
    source: Checkpoint | None = getattr(policy, "checkpoint", None)
    held = merged_state(policy.core)
    if source is None:
        return {prefix + name: tensor for name, tensor in held.items()}
    trained = {name.removeprefix("core.") for name in trained_names(policy)}
    names = {stored: stored.removeprefix(prefix) for stored in source.files}
    tied = {other: name for name, other in aliases.items() if name in trained or name not in names.values()}
    mine = {stored: tied.get(name, name) for stored, name in names.items()}
    return {s: held[name] if name in trained else source.pending(s) for s, name in mine.items()}


def merged_state(core: nn.Module) -> dict[str, Pending]:
    """The state dict under the names of a model without adapters: W + scale · B·A where LoRA was put in."""
    out: dict[str, Pending] = {}
    modules = dict(core.named_modules())
    for name, tensor in core.state_dict().items():
        if ".lora_" in name:
            continue
        pending = Pending.of(tensor)
        if ".base_layer." in name:
            if name.endswith("base_layer.weight"):
                layer = modules[name.split(".base_layer.")[0]]
                pending = Pending(torch.float32, tuple(tensor.shape), partial(_merged, tensor, layer))
            name = name.replace(".base_layer.", ".")
        out[name] = pending
    return out


@torch.no_grad()
def _merged(weight: Tensor, layer: nn.Module) -> Tensor:
    return weight.float() + layer.get_delta_weight("default").to(weight.device)


def trained_names(policy: nn.Module) -> set[str]:
    """Names of the weights that training moved; an adapter moves the weight below it."""
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    below = {name.split(".lora_")[0] + ".weight" for name in names if ".lora_" in name}
    return {name for name in names if ".lora_" not in name} | below


def write_model(tensors: Mapping[str, Pending], folder: Path, shard: int | None = None) -> None:
    """`model.safetensors`, or files of at most `shard` bytes with an index where they do not fit into one.

    A tensor that is larger than that gets a file of its own.
    """
    parts = _parts(tensors, shard)
    if len(parts) == 1:
        write_tensors(folder / SINGLE, tensors, FORMAT)
        return
    files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_tensors(folder / file, part, FORMAT)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _parts(tensors: Mapping[str, Pending], shard: int | None) -> list[dict[str, Pending]]:
    parts: list[dict[str, Pending]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):  # the same files whatever order they came in
        if shard is not None and parts[-1] and size + tensor.nbytes > shard:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets this name when it is whole. ValueError when the name holds files."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files already; name a folder that does not exist")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    if folder.exists():
        folder.rmdir()
    os.replace(part, folder)


def write_extras(folder: Path, extras: Mapping[str, Any]) -> None:
    """Further files of an export: name -> JSON content, or a path to copy."""
    for name, content in extras.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(json.dumps(content, indent=2))


def copy_beside(source: Path, folder: Path, folders: tuple[str, ...]) -> None:
    """Everything beside the weights, unchanged: configs, processors, statistics, tokenizer, the named folders."""
    for path in source.iterdir():
        weights = path.name.startswith(("model.", "model-", "action_head_"))
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja") and not weights:
            shutil.copyfile(path, folder / path.name)
    for name in folders:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
