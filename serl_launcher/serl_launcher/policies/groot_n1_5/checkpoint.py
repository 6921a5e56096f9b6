"""The two layouts of a GR00T N1.5 checkpoint: its configuration, and what stands beside its weights.

NVIDIA's: config.json (`gr00t_n1_5`), model.safetensors or shards, experiment_cfg/metadata.json with the statistics; a
backbone other than the release's has its configuration in backbone/. LeRobot's `groot` type of 0.4 and 0.5:
config.json, model.safetensors under `_groot_model.`, its processors. groot_n1_5.build reads, groot_n1_5.saving writes.

What is not in a checkpoint, and so assumed as NVIDIA's SO-100 and SO-101 data configs have it: states and actions are
mapped by their range onto [−1, 1], parts stand in the order of metadata.json, pictures are cropped to 95%.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serl_launcher.policies.checkpoint import PREPROCESSOR, Checkpoint, CheckpointError, camera_order, visual_features
from serl_launcher.policies.groot.assets import Described, affine, described, flat_statistics
from serl_launcher.policies.groot.checkpoint import LEROBOT_PREFIX
from serl_launcher.policies.groot_n1_5.core import RELEASED, N15Config, N15Core
from serl_launcher.policies.normalise import Units
from serl_launcher.policies.relative import anchors_of_steps
from serl_transport.contract.specs import TaskSpec

TYPE, LEROBOT = "gr00t_n1_5", "groot"
METADATA = "experiment_cfg/metadata.json"
PACK, UNPACK = "groot_pack_inputs_v3", "groot_action_unpack_unnormalize_v1"
SLOTS = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}  # EMBODIMENT_TAG_MAPPING
_EMBEDDING = "backbone.eagle_model.language_model.model.embed_tokens.weight"
ALIASES = {_EMBEDDING: "backbone.eagle_model.language_model.lm_head.weight"}
POOLING = "backbone.eagle_model.vision_model.vision_model.head."  # SigLIP's, which no action depends on
ENDS = ("min", "max")


def is_n1_5(found: Checkpoint) -> bool:
    """Whether the folder holds a GR00T N1.5, in either layout."""
    if found.config.get("type") == LEROBOT:
        return any(step.get("registry_name") == PACK for step in _steps(found))
    return found.config.get("model_type") == TYPE


def is_lerobot(found: Checkpoint) -> bool:
    """Whether the folder is LeRobot's. CheckpointError for one of another model."""
    if found.config.get("type") == LEROBOT:
        if not is_n1_5(found):
            raise CheckpointError(
                f"{found.folder}: a groot of LeRobot, but not its N1.5 (no {PACK}); see policy=groot_n1_7"
            )
        return True
    found.expect_type(TYPE)
    return False


def prefix_of(found: Checkpoint) -> str:
    """What the names in the file begin with."""
    return LEROBOT_PREFIX if is_lerobot(found) else ""


def build_core(found: Checkpoint) -> N15Core:
    """The model of a checkpoint's configuration on the meta device. Raises CheckpointError."""
    fields, folder = model_config(found)
    eagle = folder / "backbone" / "config.json"
    try:
        config = N15Config.of(fields, json.loads(eagle.read_text()) if eagle.is_file() else None)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    with torch.device("meta"):
        return N15Core(config)


def model_config(found: Checkpoint) -> tuple[dict[str, Any], Path]:
    """Fields of N1.5's config.json, and the folder they come from: LeRobot's type keeps them in the base model that it
    names, a folder or the release."""
    if not is_lerobot(found):
        return found.config, found.folder
    base = str(found.config.get("base_model_path") or "nvidia/GR00T-N1.5-3B")
    local = Path(base).expanduser() / "config.json"
    if local.is_file():
        return json.loads(local.read_text()), local.parent
    if base.rstrip("/") != "nvidia/GR00T-N1.5-3B":
        raise CheckpointError(f"{found.folder}: base_model_path={base} in config.json: no such folder")
    return RELEASED, found.folder


@dataclass(frozen=True, slots=True)
class N15Assets:
    """Everything but the weights, checked against the task."""

    units: Units
    slot: int  # of the embodiment-specific weights
    cameras: tuple[str, ...]  # the task's cameras in the checkpoint's order
    lerobot: bool  # pictures and prompts as LeRobot prepares them
    described: Described | None  # a new embodiment's statistics, for the export
    clip: bool = False  # as `GrootAssets`, like the rest
    horizon: int | None = None
    mode: str = "MIN_MAX"


def read_assets(
    found: Checkpoint,
    tag: str,
    spec: TaskSpec,
    mapping: dict[str, str],
    dataset: str | None = None,
    relative: Mapping[str, Any] | None = None,
) -> N15Assets:
    """Arguments as groot.assets.read_assets. Raises CheckpointError naming what is absent or does not fit."""
    if relative is not None:
        raise CheckpointError("policy.relative: GR00T N1.5 has no recipe with relative actions; leave it null")
    lerobot = is_lerobot(found)
    embodiment, slot, new = _lerobot(found, spec) if lerobot else _nvidia(found, tag, spec, dataset)
    statistics, parts = embodiment.statistics, embodiment.modality
    units = Units(
        affine(found, statistics, parts, "state", ENDS, len(spec.state_names)),
        affine(found, statistics, parts, "action", ENDS, len(spec.action_names)),
    )
    wanted = parts.get("video", {}).get("modality_keys") or [mapping.get(camera, camera) for camera in spec.cameras]
    order = camera_order(found.folder, wanted, spec, mapping)
    return N15Assets(units, slot, order, lerobot, embodiment if new else None)


def _nvidia(found: Checkpoint, tag: str, spec: TaskSpec, dataset: str | None) -> tuple[Described, int, bool]:
    path = found.folder / METADATA
    metadata = json.loads(path.read_text()) if path.is_file() else {}
    if tag not in SLOTS:
        raise CheckpointError(f"policy.embodiment_tag={tag}: GR00T N1.5 has {', '.join(SLOTS)}")
    if tag not in metadata and dataset:
        return described(spec, dataset, None), SLOTS[tag], True
    if tag not in metadata:
        raise CheckpointError(
            f"{found.folder}: no normalisation statistics of embodiment {tag!r} ({METADATA} has {sorted(metadata)}); "
            "to start a new embodiment from a dataset's, set policy.statistics to its folder"
        )
    entry = metadata[tag]
    modalities, statistics = entry.get("modalities", {}), entry.get("statistics", {})
    for what in ("state", "action"):
        for part, facts in modalities.get(what, {}).items():
            if facts.get("rotation_type"):
                raise CheckpointError(
                    f"{path}: {what}.{part} is a rotation ({facts['rotation_type']}), which N1.5's data configs "
                    "convert; only parts that are mapped by their range are supported"
                )
            if what == "action" and facts.get("absolute") is False:
                raise CheckpointError(f"{path}: action.{part} is relative, which is not supported")
    keys = {name: list(modalities.get(name) or statistics.get(name, {})) for name in ("video", "state", "action")}
    return Described(statistics, {name: {"modality_keys": found} for name, found in keys.items()}), SLOTS[tag], False


def _lerobot(found: Checkpoint, spec: TaskSpec) -> tuple[Described, int, bool]:
    step = next(step for step in _steps(found) if step.get("registry_name") == PACK)
    config = step.get("config", {})
    if anchors_of_steps(found, spec, (PACK,), (UNPACK,)) is not None:
        raise CheckpointError(f"{found.folder}: relative actions of a GR00T N1.5 are not supported")
    if not config.get("normalize_min_max", True):
        raise CheckpointError(f"{found.folder / PREPROCESSOR}: normalize_min_max=false is not supported")
    statistics = flat_statistics(found, step.get("state_file"))
    modality = {what: {"modality_keys": ["all"]} for what in ("state", "action")}
    modality["video"] = {"modality_keys": sorted(visual_features(found))}  # its processor sorts them
    slot = int((config.get("embodiment_mapping") or SLOTS).get(config.get("embodiment_tag"), 0))
    return Described(statistics, modality), slot, False


def _steps(found: Checkpoint) -> list[dict[str, Any]]:
    path = found.folder / PREPROCESSOR
    if not path.is_file():
        raise CheckpointError(f"{found.folder}: no {PREPROCESSOR}, so no normalisation statistics")
    return json.loads(path.read_text())["steps"]
