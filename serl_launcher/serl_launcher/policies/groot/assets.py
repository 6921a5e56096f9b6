"""What stands beside GR00T's weights: statistics, camera order, picture geometry, embodiment slot, prompt rules.

groot.build reads them, from NVIDIA's layout (statistics.json, processor_config.json, embodiment_id.json) or
from LeRobot's `groot` type (policy_preprocessor.json and its state file).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from serl_launcher.policies.checkpoint import PREPROCESSOR, Checkpoint, CheckpointError, camera_order, visual_features
from serl_launcher.policies.groot.inputs import Geometry
from serl_launcher.policies.normalise import Affine, Units
from serl_transport.contract.specs import TaskSpec

PACK, ENCODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"
NEVER_MOVED = 1e30  # divisor of a state that has one value: it is 0 to the model


@dataclass(frozen=True, slots=True)
class Described:
    """An embodiment as NVIDIA's sidecars say it."""

    statistics: dict[str, Any]  # {state: {part: {min, max, …}}, action: …}
    modality: dict[str, Any]  # {state: {modality_keys, …}, action: …, video: …}


@dataclass(frozen=True, slots=True)
class GrootAssets:
    """Everything but the weights, checked against the task."""

    units: Units
    slot: int  # of the embodiment-specific weights
    cameras: tuple[str, ...]  # the task's cameras in the checkpoint's order
    geometry: Geometry
    frames: int  # pictures of each camera
    horizon: int | None  # ticks of a chunk that were trained; None: all
    clip: bool  # values beyond the statistics' range are clipped
    formalize: bool  # prompts in lower case, without punctuation
    mode: str  # QUANTILES (1% … 99%) or MIN_MAX: the statistics that a dataset must have
    processor: str | None  # folder or hub name of tokenizer and image processor, where the checkpoint names one
    described: Described | None  # a new embodiment's entries, for the export


def read_assets(
    found: Checkpoint, tag: str, spec: TaskSpec, mapping: dict[str, str], dataset: str | None = None
) -> GrootAssets:
    """mapping: the task's camera -> the checkpoint's, where names differ; dataset: a LeRobot dataset whose statistics
    serve an embodiment that the checkpoint has none of. Raises CheckpointError naming what is absent or does not fit.
    """
    found.expect_type("Gr00tN1d7", "groot")
    raw = _lerobot(found) if found.config.get("type") == "groot" else _nvidia(found, tag, spec, dataset)
    if raw.relative:
        raise CheckpointError(f"{found.folder}: checkpoints with relative actions are not supported")
    ends = ("q01", "q99") if raw.keywords.get("use_percentiles") else ("min", "max")
    statistics, parts, keywords = raw.embodiment.statistics, raw.embodiment.modality, raw.keywords
    video = parts.get("video", {})
    wanted = video.get("modality_keys") or [mapping.get(camera, camera) for camera in spec.cameras]
    return GrootAssets(
        Units(
            affine(found, statistics, parts, "state", ends, len(spec.state_names)),
            affine(found, statistics, parts, "action", ends, len(spec.action_names)),
        ),
        raw.slot,
        camera_order(found.folder, wanted, spec, mapping),
        _geometry(keywords),
        max(1, len(video.get("delta_indices") or [0])),
        len(parts.get("action", {}).get("delta_indices") or []) or None,
        bool(keywords.get("clip_outliers", True)),
        bool(keywords.get("formalize_language", True)),
        "QUANTILES" if ends[0] == "q01" else "MIN_MAX",
        raw.processor,
        raw.embodiment if raw.new else None,
    )


@dataclass(frozen=True, slots=True)
class _Raw:
    """One embodiment's files, in one form."""

    embodiment: Described
    keywords: dict[str, Any]
    slot: int
    relative: bool
    processor: str | None = None
    new: bool = False  # the checkpoint does not know the embodiment


def _nvidia(found: Checkpoint, tag: str, spec: TaskSpec, dataset: str | None) -> _Raw:
    statistics, processor = (_json(found, name) or {} for name in ("statistics.json", "processor_config.json"))
    keywords = processor.get("processor_kwargs", {})
    if tag in statistics and processor:
        embodiment = Described(statistics[tag], keywords.get("modality_configs", {}).get(tag, {}))
    elif tag not in statistics and dataset:
        embodiment = described(spec, dataset)
    else:
        raise CheckpointError(
            f"{found.folder}: no normalisation statistics of embodiment {tag!r} (statistics.json has "
            f"{sorted(statistics)}); to start a new embodiment from a dataset's, set policy.statistics to its folder"
        )
    slots = _json(found, "embodiment_id.json") or {}
    if tag not in slots:
        raise CheckpointError(f"{found.folder}: embodiment tag {tag!r} is not in embodiment_id.json: {sorted(slots)}")
    relative = bool(keywords.get("use_relative_action"))
    configs = embodiment.modality.get("action", {}).get("action_configs") or []
    if relative and configs and all(str(c.get("rep", "")).lower() == "absolute" for c in configs):
        relative = False
    return _Raw(embodiment, keywords, int(slots[tag]), relative, new=tag not in statistics)


def described(spec: TaskSpec, dataset: str) -> Described:
    """A LeRobot dataset's statistics, part by part as its modality.json says (whole vectors without one)."""
    meta = Path(dataset).expanduser() / "meta"
    if not (meta / "stats.json").is_file():
        raise CheckpointError(f"policy.statistics={dataset}: no LeRobot dataset with statistics (meta/stats.json)")
    stats = json.loads((meta / "stats.json").read_text())
    parts = json.loads((meta / "modality.json").read_text()) if (meta / "modality.json").is_file() else {}
    statistics: dict[str, Any] = {}
    for what, column in (("state", "observation.state"), ("action", "action")):
        entries = parts.get(what) or {"all": {}}
        statistics[what] = {name: _part(stats, entry, column, dataset) for name, entry in entries.items()}
    cameras = list(parts.get("video", spec.cameras))
    return Described(statistics, modality_of(cameras, list(statistics["state"]), list(statistics["action"]), []))


def modality_of(cameras: list[str], states: list[str], actions: list[str], ticks: list[int]) -> dict[str, Any]:
    """What NVIDIA's layout says of an embodiment's parts; ticks: that were trained, empty: all."""
    absolute = {"rep": "absolute", "type": "non_eef", "format": "default"}
    keys = {"video": cameras, "state": states, "action": actions, "language": ["annotation.human.task_description"]}
    modality = {what: {"modality_keys": names, "delta_indices": [0]} for what, names in keys.items()}
    modality["action"] |= {"delta_indices": ticks, "action_configs": [absolute] * len(actions)}
    return modality


def _part(stats: dict[str, Any], entry: dict[str, Any], column: str, dataset: str) -> dict[str, list[float]]:
    key = entry.get("original_key", column)
    if key not in stats:
        raise CheckpointError(f"policy.statistics={dataset}: no statistics of column {key!r}")
    names = [name for name in ("min", "max", "mean", "std", "q01", "q99") if name in stats[key]]
    return {name: list(np.atleast_1d(stats[key][name])[entry.get("start") : entry.get("end")]) for name in names}


def _lerobot(found: Checkpoint) -> _Raw:
    content = _json(found, PREPROCESSOR)
    if content is None:
        raise CheckpointError(
            f"{found.folder}: no {PREPROCESSOR}, so no normalisation statistics; export the checkpoint with its "
            "processors"
        )
    steps = {step.get("registry_name"): step for step in content["steps"]}
    if PACK not in steps or ENCODE not in steps:
        raise CheckpointError(f"{found.folder / PREPROCESSOR}: no steps {PACK} and {ENCODE}; it has {sorted(steps)}")
    pack, encode = steps[PACK]["config"], steps[ENCODE]["config"]
    statistics, modality = pack.get("raw_stats"), dict(pack.get("modality_config") or {})
    if not statistics or not modality:
        statistics = flat_statistics(found, steps[PACK].get("state_file"))
        modality = {what: {"modality_keys": ["all"]} for what in ("state", "action")}
    keys = pack.get("video_modality_keys") or sorted(visual_features(found))
    modality["video"] = {"modality_keys": keys, "delta_indices": list(range(pack.get("video_horizon") or 1))}
    horizon = min(int(pack.get("valid_action_horizon") or 40), int(found.config.get("chunk_size") or 40))
    modality["action"] = {**modality["action"], "delta_indices": list(range(horizon))}
    if found.config.get("action_decode_transform"):
        raise CheckpointError(f"{found.folder}: action_decode_transform is not supported")
    slot = int((pack.get("embodiment_mapping") or {}).get(pack.get("embodiment_tag"), 0))
    relative = bool(found.config.get("use_relative_actions"))
    return _Raw(Described(statistics, modality), {**pack, **encode}, slot, relative, encode.get("model_name"))


def flat_statistics(found: Checkpoint, name: str | None) -> dict[str, Any]:
    """LeRobot's flat statistics of whole vectors, as one part each."""
    if name is None or not (found.folder / name).is_file():
        raise CheckpointError(f"{found.folder}: no normalisation statistics ({name or PREPROCESSOR} holds none)")
    out: dict[str, Any] = {"state": {"all": {}}, "action": {"all": {}}}
    with safe_open(found.folder / name, framework="np") as f:
        for key in f.keys():  # noqa: SIM118
            feature, _, statistic = key.rpartition(".")
            if feature in ("observation.state", "action"):
                out[feature.removeprefix("observation.")]["all"][statistic] = f.get_tensor(key).tolist()
    return out


def affine(found: Checkpoint, statistics: dict, parts: dict, what: str, ends: tuple[str, str], dims: int) -> Affine:
    """The range `ends` onto [−1, 1]; a dim that never moved is 0 as a state, its value as an action."""
    keys = parts.get(what, {}).get("modality_keys", [])
    absent = [key for key in keys if not set(ends) <= set(statistics.get(what, {}).get(key, {}))]
    which = f"normalisation statistics {list(ends)} of {what}"
    if not keys or absent:
        raise CheckpointError(f"{found.folder}: no {which} {absent or ''}".rstrip())
    try:
        low, high = (np.concatenate([np.atleast_1d(statistics[what][k][end]) for k in keys]) for end in ends)
    except ValueError as error:
        raise CheckpointError(f"{found.folder}: {which}: {error}") from None
    if low.shape != (dims,) or high.shape != (dims,):
        raise CheckpointError(f"{found.folder}: statistics of {what} have {len(low)} dims, the task has {dims}")
    for wrong, said in (
        (~(np.isfinite(low) & np.isfinite(high)), "hold NaN or Inf"),
        (high < low, f"{ends[1]} is below {ends[0]}"),
    ):
        if wrong.any():
            raise CheckpointError(f"{found.folder}: {which}: {said} in dims {np.flatnonzero(wrong).tolist()}")
    flat = high <= low
    half = np.where(flat, NEVER_MOVED if what == "state" else 1e-8, (high - low) / 2)
    return Affine(np.where(flat, low, (low + high) / 2).tolist(), half.tolist())


def _geometry(keywords: dict[str, Any]) -> Geometry:
    target, crop, sizes = keywords.get("image_target_size"), keywords.get("image_crop_size"), {}
    if target:  # the release's sizes otherwise
        sizes = {"target": tuple(map(int, target[:2])), "crop": tuple(map(int, crop[:2])) if crop else None}
    return Geometry(
        **sizes,
        crop_fraction=keywords.get("crop_fraction"),
        shortest_edge=keywords.get("shortest_image_edge"),
        letter_box=bool(keywords.get("letter_box_transform")),
        albumentations=bool(keywords.get("use_albumentations")),
    )


def _json(found: Checkpoint, name: str) -> Any:
    path = found.folder / name
    return json.loads(path.read_text()) if path.is_file() else None
