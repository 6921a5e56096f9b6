"""GR00T N1.7 checkpoints in NVIDIA's layout: read strictly, written so that lerobot's GR00TN17 loads them.

config.json, model.safetensors (or 5 GB shards with an index), statistics.json, processor_config.json,
embodiment_id.json; beside them, for their users: action_head_<embodiment>.safetensors, and what `extras` names
(trainer_state.json, experiment_cfg/, modality.json). A backbone other than Cosmos-Reason2 has its config in backbone/.
policies.groot calls `load_groot`; tools/export_checkpoint.py calls `save_groot`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError
from serl_launcher.policies.loading import LoadReport, fill, materialise_buffers
from serl_launcher.policies.normalise import Affine, Units
from serl_transport.specs import TaskSpec

COSMOS = "nvidia/Cosmos-Reason2-2B"
SHARD = "5GB"


def build_core(found: Checkpoint) -> nn.Module:
    """`GR00TN17` of a checkpoint's config on the meta device; nothing is fetched. Raises CheckpointError."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

    found.expect_type("Gr00tN1d7")
    fields = {k: v for k, v in found.config.items() if k not in ("architectures", "torch_dtype", "load_bf16")}
    backbone = found.folder / "backbone"
    if backbone.is_dir():
        fields["model_name"] = str(backbone)
    elif fields.get("model_name") != COSMOS:
        raise CheckpointError(
            f"{found.folder}: backbone {fields.get('model_name')!r} and no folder backbone/ beside it"
        )
    with torch.device("meta"):
        core = GR00TN17(GR00TN17Config(**fields), load_backbone_weights=False)
    core.backbone.model.lm_head = nn.Identity()  # tied to the embedding, and never read
    return core


def fill_core(core: nn.Module, found: Checkpoint) -> LoadReport:
    """Every tensor, strictly, in fp32. Raises CheckpointError naming what does not fit."""
    report = fill(core, found, "", {}, lambda name: name.endswith("lm_head.weight"), lambda _: torch.float32)
    materialise_buffers(core)
    return report


def slot_of(found: Checkpoint, tag: str) -> int:
    """The embodiment's slot. Raises CheckpointError naming the tags that there are."""
    path = found.folder / "embodiment_id.json"
    slots = json.loads(path.read_text()) if path.is_file() else {}
    if tag not in slots:
        raise CheckpointError(f"{found.folder}: embodiment tag {tag!r} is not in embodiment_id.json: {sorted(slots)}")
    return int(slots[tag])


def units_of_groot(found: Checkpoint, tag: str, spec: TaskSpec) -> Units:
    """Range (or 1% … 99%) onto [−1, 1], the parts in the checkpoint's order. Raises CheckpointError when absent."""
    statistics, processor = (_json(found.folder / name) for name in ("statistics.json", "processor_config.json"))
    if tag not in (statistics or {}) or processor is None:
        raise CheckpointError(f"{found.folder}: no normalisation statistics of embodiment {tag!r} (statistics.json)")
    keywords = processor.get("processor_kwargs", {})
    if keywords.get("use_relative_action"):
        raise CheckpointError(f"{found.folder}: use_relative_action checkpoints are not supported")
    ends = ("q01", "q99") if keywords.get("use_percentiles") else ("min", "max")
    parts = keywords.get("modality_configs", {}).get(tag, {})
    return Units(
        _affine(found, statistics[tag], parts, "state", ends, len(spec.state_names)),
        _affine(found, statistics[tag], parts, "action", ends, len(spec.action_names)),
    )


def _affine(found: Checkpoint, statistics: dict, parts: dict, what: str, ends: tuple[str, str], dims: int) -> Affine:
    keys = parts.get(what, {}).get("modality_keys", [])
    absent = [key for key in keys if not set(ends) <= set(statistics.get(what, {}).get(key, {}))]
    if not keys or absent:
        raise CheckpointError(
            f"{found.folder}: no normalisation statistics {list(ends)} of {what} {absent or ''}".rstrip()
        )
    low, high = (np.concatenate([np.atleast_1d(statistics[what][key][end]) for key in keys]) for end in ends)
    if len(low) != dims:
        raise CheckpointError(f"{found.folder}: statistics of {what} have {len(low)} dims, the task has {dims}")
    width = np.where(high > low, high - low, 1e-8)
    return Affine((low + width / 2).tolist(), (width / 2).tolist())


def save_groot(policy: nn.Module, folder: Path, tag: str, extras: dict[str, Any] | None = None) -> Path:
    """Write the policy; frozen tensors and the files beside the weights are the source's, where there is one.

    extras: file name -> JSON content, or a path to copy. Raises ValueError when the folder holds files.
    """
    from huggingface_hub import save_torch_state_dict

    folder, source = Path(folder), getattr(policy, "checkpoint", None)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files already; name a folder that does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    moved = {name.removeprefix("core.") for name, p in policy.named_parameters() if p.requires_grad}
    tensors = {}
    for name, tensor in policy.core.state_dict().items():
        if not name.endswith("lm_head.weight"):
            kept = source is not None and name not in moved
            tensors[name] = source.tensor(name) if kept else tensor.detach().cpu().contiguous()
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD)
    head = {k.removeprefix("action_head."): v for k, v in tensors.items() if k.startswith("action_head.")}
    save_file(head, folder / f"action_head_{tag}.safetensors", metadata={"format": "pt"})
    if source is None:
        _write_sidecars(policy, folder, tag)
    else:
        for path in source.folder.iterdir():
            if path.suffix == ".json" and not path.name.startswith("model"):
                shutil.copyfile(path, folder / path.name)
        if (source.folder / "backbone").is_dir():
            shutil.copytree(source.folder / "backbone", folder / "backbone")
    for name, content in (extras or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def _write_sidecars(policy: nn.Module, folder: Path, tag: str) -> None:
    """What describes a policy that began at random; its units become the statistics."""
    config = policy.core.config.to_dict() | {"model_type": "Gr00tN1d7", "load_bf16": False}
    if config["model_name"] != COSMOS:
        policy.backbone.model.config.save_pretrained(folder / "backbone")
        config["model_name"] = "backbone"
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    (folder / "embodiment_id.json").write_text(json.dumps({tag: policy.embodiment}))
    parts = {"video": {"modality_keys": list(policy.cameras)}}
    statistics = {}
    for what, units in (("state", policy.state_units), ("action", policy.action_units)):
        low, high = (units.offset - units.scale).tolist(), (units.offset + units.scale).tolist()
        mean, std = units.offset.tolist(), units.scale.tolist()
        statistics[what] = {"all": {"min": low, "max": high, "q01": low, "q99": high, "mean": mean, "std": std}}
        parts[what] = {"modality_keys": ["all"]}
    (folder / "statistics.json").write_text(json.dumps({tag: statistics}, indent=2))
    keywords = {"modality_configs": {tag: parts}, "use_percentiles": False, "use_relative_action": False}
    (folder / "processor_config.json").write_text(json.dumps({"processor_kwargs": keywords}, indent=2))


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
