"""A GR00T N1.5 as a folder, in the layout that it came from: NVIDIA's, or LeRobot's of 0.4 and 0.5.

tools/export_checkpoint.py calls the head's `save`. Beside the weights go what `extras` names (trainer_state.json,
experiment_cfg/, modality.json), the action head alone, action_head_<embodiment>.safetensors, and the projector: the
embodiment's own encoders and decoder, projector_<embodiment>.safetensors. No optimizer state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from serl_launcher.policies.groot.assets import Described
from serl_launcher.policies.groot_n1_5.checkpoint import ALIASES, METADATA, prefix_of
from serl_launcher.policies.groot_n1_5.inputs import EagleInputs
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

PROJECTOR = ("state_encoder.", "action_encoder.", "action_decoder.", "position_embedding.")


def save_groot_n1_5(
    policy: nn.Module, folder: Path, extras: Mapping[str, Any] | None = None, shard: int = SHARD
) -> Path:
    """Arguments and frozen tensors as `groot.saving.save_groot`. Raises ValueError when the folder holds files."""
    folder, source, tag = Path(folder), getattr(policy, "checkpoint", None), policy.embodiment_tag
    prefix = "" if source is None else prefix_of(source)
    tensors = tensors_to_save(policy, prefix, ALIASES)
    start = f"{prefix}action_head."
    head = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    projector = {name: tensor for name, tensor in head.items() if name.startswith(PROJECTOR)}
    with new_folder(folder) as part:
        write_model(tensors, part, None if prefix else shard)
        write_tensors(part / f"action_head_{tag}.safetensors", head, FORMAT)
        write_tensors(part / f"projector_{tag}.safetensors", projector, FORMAT)
        _write_beside(policy, part, tag)
        write_extras(part, extras or {})
    return folder


def _write_beside(policy: nn.Module, folder: Path, tag: str) -> None:
    source = getattr(policy, "checkpoint", None)
    if source is None:
        _write_sidecars(policy, folder, tag)
        return
    copy_beside(source.folder, folder, ("backbone", "processor"))
    if (source.folder / METADATA).is_file():
        _write_metadata(folder, json.loads((source.folder / METADATA).read_text()))
    if getattr(policy, "described", None) is not None:
        _write_metadata(folder, {tag: _entry(policy.described, tag)})


def _write_metadata(folder: Path, entries: dict[str, Any]) -> None:
    path = folder / METADATA
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | entries, indent=2))


def _entry(described: Described, tag: str) -> dict[str, Any]:
    """An embodiment as metadata.json holds it."""
    modalities: dict[str, Any] = {"video": {name: {} for name in described.modality["video"]["modality_keys"]}}
    for what in ("state", "action"):
        parts = described.statistics[what]
        facts = {"absolute": True, "rotation_type": None, "continuous": True}
        modalities[what] = {name: {**facts, "shape": [len(values["min"])]} for name, values in parts.items()}
    return {"statistics": described.statistics, "modalities": modalities, "embodiment_tag": tag}


def _write_sidecars(policy: nn.Module, folder: Path, tag: str) -> None:
    """What describes a policy that began at random; its units become the statistics."""
    config = policy.core.config
    (folder / "config.json").write_text(json.dumps(config.fields, indent=2))
    (folder / "backbone").mkdir()
    (folder / "backbone" / "config.json").write_text(json.dumps(config.eagle, indent=2))
    statistics = {}
    for what, units in (("state", policy.state_units), ("action", policy.action_units)):
        low, high = (units.offset - units.scale).tolist(), (units.offset + units.scale).tolist()
        mean, std = units.offset.tolist(), units.scale.tolist()
        statistics[what] = {"all": {"min": low, "max": high, "q01": low, "q99": high, "mean": mean, "std": std}}
    described = Described(statistics, {"video": {"modality_keys": list(policy.cameras)}})
    _write_metadata(folder, {tag: _entry(described, tag)})
    if isinstance(policy.inputs, EagleInputs):
        policy.inputs.tokenizer.save_pretrained(folder / "processor")
