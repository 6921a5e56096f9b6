"""The two layouts of a GR00T N1.7 checkpoint, and the model that its configuration describes.

Two layouts. NVIDIA's: config.json, model.safetensors (or 5 GB shards with an index), statistics.json,
processor_config.json, embodiment_id.json, a backbone other than Cosmos-Reason2 in backbone/. LeRobot's `groot` type:
config.json, model.safetensors under `_groot_model.`, its processors. groot.build reads, groot.saving writes.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError, from_hub

COSMOS = "nvidia/Cosmos-Reason2-2B"
RELEASED = "nvidia/GR00T-N1.7-3B"
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
        return GR00TN17(GR00TN17Config(**{**fields, "use_flash_attention": False}), load_backbone_weights=False)


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

    where = f"{found.folder}: base_model_path={base} in config.json: no such folder"
    path = from_hub(partial(hf_hub_download, base, "config.json"), base, where)
    return json.loads(path.read_text()), path.parent
