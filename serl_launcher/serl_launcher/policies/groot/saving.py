"""A GR00T N1.7 as a folder that lerobot loads, in the layout that it came from.

tools/export_checkpoint.py calls the head's `save`. Beside the weights go what `extras` names (trainer_state.json,
experiment_cfg/, modality.json) and the action head alone, action_head_<embodiment>.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serl_launcher.policies.groot.assets import Described
from serl_launcher.policies.groot.checkpoint import COSMOS, prefix_of
from serl_launcher.policies.groot.inputs import QwenInputs
from serl_launcher.policies.groot.parts import Part, modality_of, split
from serl_launcher.policies.normalise import Affine
from serl_launcher.policies.saving import (
    FORMAT,
    SHARD,
    copy_beside,
    new_folder,
    tensors_to_save,
    write_extras,
    write_model,
)
from serl_launcher.tensor_files import write_tensors


def save_groot(policy: nn.Module, folder: Path, extras: Mapping[str, Any] | None = None, shard: int = SHARD) -> Path:
    """Write the policy in its source's layout, in NVIDIA's without one; frozen tensors and the files beside the weights
    are the source's.

    extras: file name -> JSON content, or a path to copy. Raises ValueError when the folder holds files.
    """
    folder, source, tag = Path(folder), getattr(policy, "checkpoint", None), policy.embodiment_tag
    prefix = "" if source is None else prefix_of(source)
    tensors = tensors_to_save(policy, prefix, policy.aliases)
    start = f"{prefix}action_head."
    head = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    with new_folder(folder) as part:
        write_model(tensors, part, None if prefix else shard)
        write_tensors(part / f"action_head_{tag}.safetensors", head, FORMAT)
        if source is None:
            write_sidecars(policy, part, tag)
        else:
            copy_beside(source.folder, part, ("backbone", "processor"))
            if hasattr(policy.inputs, "describe") and not (part / "processor").is_dir():
                policy.inputs.describe(part)  # a tokenizer that the source lacks
            if getattr(policy, "described", None) is not None:
                _add_embodiment(policy.described, part, tag)
        write_extras(part, extras or {})
    return folder


def _add_embodiment(described: Described, folder: Path, tag: str) -> None:
    """A new embodiment's statistics and parts beside those that the checkpoint came with."""
    path = folder / "statistics.json"
    statistics = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(statistics | {tag: described.statistics}, indent=2))
    path = folder / "processor_config.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    configs = content.setdefault("processor_kwargs", {}).setdefault("modality_configs", {})
    configs[tag] = described.modality
    if "relative_action" in described.statistics:
        content["processor_kwargs"]["use_relative_action"] = True
    path.write_text(json.dumps(content, indent=2))


def write_sidecars(policy: nn.Module, folder: Path, tag: str) -> None:
    """What describes a policy that began at random; its units become the statistics."""
    policy.write_config(folder)
    (folder / "embodiment_id.json").write_text(json.dumps({tag: policy.embodiment}))
    states, actions = split(policy.anchors, len(policy.state_units.offset), policy.robot_dim)
    ticks = list(range(policy.valid_horizon))
    parts = modality_of(list(policy.cameras), [part.name for part in states], actions, ticks)
    statistics = {
        "state": {part.name: _statistics(policy.state_units, part) for part in states},
        "action": {part.name: _statistics(_absolute(policy, part), part) for part in actions},
    }
    if policy.anchors is not None:
        own = [part for part in actions if part.state is not None]
        statistics["relative_action"] = {part.name: _statistics(policy.action_units, part) for part in own}
    (folder / "statistics.json").write_text(json.dumps({tag: statistics}, indent=2))
    keywords = {"modality_configs": {tag: parts}, "use_percentiles": False}
    keywords["use_relative_action"] = policy.anchors is not None
    keywords |= {"clip_outliers": policy.clip, "max_action_horizon": policy.action_horizon}
    keywords |= _picture_keywords(policy, folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_kwargs": keywords}, indent=2))


def write_config(policy: nn.Module, folder: Path) -> None:
    """config.json of an N1.7, and its backbone's in backbone/ where that is not the release's."""
    config = policy.core.config.to_dict() | {"model_type": "Gr00tN1d7", "load_bf16": False, "dtype": "float32"}
    if config["model_name"] != COSMOS:
        policy.backbone.model.config.save_pretrained(folder / "backbone")
        config["model_name"] = "backbone"
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))


def _absolute(policy: nn.Module, part: Part) -> Affine:
    """The task's limits where a part is relative: nothing is normalised by them, but its width is read from them."""
    units = policy.action_units
    if part.state is not None:
        return Affine.from_bounds(policy._low.tolist(), policy._high.tolist())
    return units if units.offset.ndim == 1 else Affine(units.offset[0].tolist(), units.scale[0].tolist())


def _statistics(units: Affine, part: Part) -> dict[str, list]:
    """Ranges of a part's dims, by tick where they differ by tick; a dim that never moved has one value."""
    offset, half = (x[..., part.first : part.end].cpu() for x in (units.offset, units.scale))
    half = torch.where(half.isinf(), 0, half)
    low, high, mean, std = (x.tolist() for x in (offset - half, offset + half, offset, half))
    return {"min": low, "max": high, "q01": low, "q99": high, "mean": mean, "std": std}


def _picture_keywords(policy: nn.Module, folder: Path) -> dict[str, Any]:
    """Geometry and prompt rules, and the tokenizer's files beside them, where the policy has a real processor."""
    inputs = policy.inputs
    if hasattr(inputs, "describe"):
        return inputs.describe(folder)
    if not isinstance(inputs, QwenInputs):
        return {}
    inputs.tokenizer.save_pretrained(folder / "processor")
    inputs.pictures.save_pretrained(folder / "processor")
    g = inputs.geometry
    return {
        "image_target_size": g.target and list(g.target),
        "image_crop_size": g.crop and list(g.crop),
        "crop_fraction": g.crop_fraction,
        "shortest_image_edge": g.shortest_edge,
        "letter_box_transform": g.letter_box,
        "use_albumentations": g.albumentations,
        "formalize_language": inputs.formalize,
    }
