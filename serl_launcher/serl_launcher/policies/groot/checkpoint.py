"""GR00T N1.7's weights and the files beside them, read strictly and written so that lerobot loads the folder.

Two layouts. NVIDIA's: config.json, model.safetensors (or 5 GB shards with an index), statistics.json,
processor_config.json, embodiment_id.json, a backbone other than Cosmos-Reason2 in backbone/. LeRobot's `groot` type:
config.json, model.safetensors under `_groot_model.`, its processors. An export keeps its source's layout and adds what
`extras` names (trainer_state.json, experiment_cfg/, modality.json) and action_head_<embodiment>.safetensors.
policies.groot builds from it; tools/export_checkpoint.py calls `save_groot`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from serl_launcher.policies.checkpoint import SINGLE, Checkpoint, CheckpointError
from serl_launcher.policies.groot.assets import Described
from serl_launcher.policies.groot.inputs import QwenInputs

COSMOS = "nvidia/Cosmos-Reason2-2B"
RELEASED = "nvidia/GR00T-N1.7-3B"
SHARD = "5GB"
EMBEDDING, HEAD = "backbone.model.model.language_model.embed_tokens.weight", "backbone.model.lm_head.weight"
ALIASES = {EMBEDDING: HEAD}
LEROBOT_PREFIX = "_groot_model."


def prefix_of(found: Checkpoint) -> str:
    """What the names in the file begin with."""
    return LEROBOT_PREFIX if found.config.get("type") == "groot" else ""


def build_core(found: Checkpoint) -> nn.Module:
    """`GR00TN17` of a checkpoint's config on the meta device; no weights are fetched. Raises CheckpointError."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

    found.expect_type("Gr00tN1d7", "groot")
    fields, folder = model_config(found)
    fields = {k: v for k, v in fields.items() if k not in ("architectures", "torch_dtype", "load_bf16")}
    backbone = folder / "backbone"
    if backbone.is_dir():
        fields["model_name"] = str(backbone)
    elif fields.get("model_name", COSMOS) != COSMOS:
        raise CheckpointError(f"{folder}: backbone {fields['model_name']!r} and no folder backbone/ beside it")
    # Nothing here needs flash-attn; the library would ask for it where the config says so.
    with torch.device("meta"):
        core = GR00TN17(GR00TN17Config(**{**fields, "use_flash_attention": False}), load_backbone_weights=False)
    core.backbone.model.lm_head = nn.Identity()  # tied to the embedding, and never read
    return core


def model_config(found: Checkpoint) -> tuple[dict[str, Any], Path]:
    """Fields of `GR00TN17Config`, and the folder they come from.

    LeRobot's type keeps them in the base model it names: a folder, the released model, or a hub repository's config.
    """
    if found.config.get("type") != "groot":
        return found.config, found.folder
    base = str(found.config.get("base_model_path") or RELEASED)
    local = Path(base).expanduser() / "config.json"
    if local.is_file():
        return json.loads(local.read_text()), local.parent
    if base.rstrip("/") == RELEASED:
        return {}, found.folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(base, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{found.folder}: base_model_path={base} in config.json: no such folder, and the hub did not give its "
            f"config.json: {str(error).splitlines()[0]}"
        ) from None
    return json.loads(path.read_text()), path.parent


def save_groot(
    policy: nn.Module, folder: Path, tag: str, extras: dict[str, Any] | None = None, shard: str = SHARD
) -> Path:
    """Write the policy; frozen tensors and the files beside the weights are the source's, where there is one.

    extras: file name -> JSON content, or a path to copy. Raises ValueError when the folder holds files.
    """
    folder, source = Path(folder), getattr(policy, "checkpoint", None)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files already; name a folder that does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_to_save(policy, source)
    prefix = "" if source is None else prefix_of(source)
    if prefix:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    else:
        from huggingface_hub import save_torch_state_dict

        save_torch_state_dict(tensors, folder, max_shard_size=shard)
    start = f"{prefix}action_head."
    head = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    save_file(head, folder / f"action_head_{tag}.safetensors", metadata={"format": "pt"})
    if source is None:
        _write_sidecars(policy, folder, tag)
    else:
        _copy_sidecars(source.folder, folder)
        if getattr(policy, "described", None) is not None:
            _add_embodiment(policy.described, folder, tag)
    for name, content in (extras or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def tensors_to_save(policy: nn.Module, source: Checkpoint | None) -> dict[str, Tensor]:
    """Every tensor under its name in the file: trained ones as they are, the others as the source holds them."""
    held = {n: t for n, t in policy.core.state_dict().items() if not n.endswith("lm_head.weight")}
    if source is None:
        return {name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}
    prefix = prefix_of(source)
    moved = {name.removeprefix("core.") for name, p in policy.named_parameters() if p.requires_grad}
    names = {stored: stored.removeprefix(prefix) for stored in source.files}
    out: dict[str, Tensor] = {}
    for stored, name in names.items():
        mine = EMBEDDING if name == HEAD and EMBEDDING not in names.values() else name
        out[stored] = held[mine].detach().cpu().contiguous() if mine in moved else source.tensor(stored)
    return out


def _copy_sidecars(source: Path, folder: Path) -> None:
    """Everything but weights and training states."""
    for path in source.iterdir():
        if path.name.startswith(("model.", "model-", "action_head_")):
            continue
        if path.is_file() and path.suffix in (".json", ".txt", ".jinja", ".model", ".safetensors"):
            shutil.copyfile(path, folder / path.name)
    for name in ("backbone", "processor"):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def _add_embodiment(described: Described, folder: Path, tag: str) -> None:
    """A new embodiment's statistics and parts beside those that the checkpoint came with."""
    path = folder / "statistics.json"
    statistics = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(statistics | {tag: described.statistics}, indent=2))
    path = folder / "processor_config.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    configs = content.setdefault("processor_kwargs", {}).setdefault("modality_configs", {})
    configs[tag] = described.modality
    path.write_text(json.dumps(content, indent=2))


def _write_sidecars(policy: nn.Module, folder: Path, tag: str) -> None:
    """What describes a policy that began at random; its units become the statistics."""
    config = policy.core.config.to_dict() | {"model_type": "Gr00tN1d7", "load_bf16": False, "dtype": "float32"}
    if config["model_name"] != COSMOS:
        policy.backbone.model.config.save_pretrained(folder / "backbone")
        config["model_name"] = "backbone"
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    (folder / "embodiment_id.json").write_text(json.dumps({tag: policy.embodiment}))
    whole = {"modality_keys": ["all"], "delta_indices": [0]}
    absolute = {"rep": "absolute", "type": "non_eef", "format": "default"}
    ticks = list(range(policy.valid_horizon))
    parts = {
        "video": {"modality_keys": list(policy.cameras), "delta_indices": [0]},
        "state": whole,
        "action": {"modality_keys": ["all"], "delta_indices": ticks, "action_configs": [absolute]},
        "language": {"modality_keys": ["annotation.human.task_description"], "delta_indices": [0]},
    }
    statistics = {}
    for what, units in (("state", policy.state_units), ("action", policy.action_units)):
        low, high = (units.offset - units.scale).tolist(), (units.offset + units.scale).tolist()
        mean, std = units.offset.tolist(), units.scale.tolist()
        statistics[what] = {"all": {"min": low, "max": high, "q01": low, "q99": high, "mean": mean, "std": std}}
    (folder / "statistics.json").write_text(json.dumps({tag: statistics}, indent=2))
    keywords = {"modality_configs": {tag: parts}, "use_percentiles": False, "use_relative_action": False}
    keywords |= {"clip_outliers": policy.clip, "max_action_horizon": policy.action_horizon}
    keywords |= _picture_keywords(policy, folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_kwargs": keywords}, indent=2))


def _picture_keywords(policy: nn.Module, folder: Path) -> dict[str, Any]:
    """Geometry and prompt rules, and the tokenizer's files beside them, where the policy has a real processor."""
    inputs = policy.inputs
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
