"""What stands beside GR00T's weights: statistics, camera order, picture geometry, embodiment slot, prompt rules.

groot.build reads them, from NVIDIA's layout (statistics.json, processor_config.json, embodiment_id.json) or
from LeRobot's `groot` type (policy_preprocessor.json and its state file).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from serl_launcher.policies.checkpoint import (
    POSTPROCESSOR,
    PREPROCESSOR,
    Checkpoint,
    CheckpointError,
    camera_order,
    visual_features,
)
from serl_launcher.policies.groot.inputs import Geometry
from serl_launcher.policies.groot.parts import (
    Part,
    anchored,
    laid,
    modality_of,
    part_anchors,
    relative_keys,
    relative_range,
    split,
)
from serl_launcher.policies.normalise import Affine, Units
from serl_launcher.policies.relative import Anchors, anchors_of_steps, misplaced, wanted_anchors
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("policy")
PACK, ENCODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"
DECODE, UNPACK = "groot_n1_7_action_decode_v1", "groot_action_unpack_unnormalize_v2"
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
    geometry: Any  # of pictures: `groot.inputs.Geometry`, or what another release has
    frames: int  # pictures of each camera
    horizon: int | None  # ticks of a chunk that were trained; None: all
    clip: bool  # values beyond the statistics' range are clipped
    formalize: bool  # prompts in lower case, without punctuation
    mode: str  # QUANTILES (1% … 99%) or MIN_MAX: the statistics that a dataset must have
    processor: str | None  # folder or hub name of tokenizer and image processor, where the checkpoint names one
    described: Described | None  # a new embodiment's entries, for the export


def read_assets(
    found: Checkpoint,
    tag: str,
    spec: TaskSpec,
    mapping: dict[str, str],
    dataset: str | None = None,
    relative: Mapping[str, Any] | None = None,
    *,
    types: tuple[str, ...] = ("Gr00tN1d7", "groot"),
    slots: Mapping[str, int] | None = None,
    geometry: Callable[[dict[str, Any]], Any] | None = None,
) -> GrootAssets:
    """mapping: the task's camera -> the checkpoint's, where names differ; dataset: a LeRobot dataset whose statistics
    serve an embodiment that the checkpoint has none of; relative: which of its actions are then relative to the state.
    Of another release with this layout: types of its config.json, slots of embodiments that an embodiment_id.json
    does not list, geometry from the processor's keywords. Raises CheckpointError naming what is absent or does not fit.
    """
    found.expect_type(*types)
    given = (tag, spec, dataset, relative, slots)
    raw = _lerobot(found) if found.config.get("type") == "groot" else _nvidia(found, *given)
    if relative is not None and not raw.new:
        raise CheckpointError(f"policy.relative: {found.folder} says itself which actions of {tag!r} are relative")
    if found.config.get("type") != "groot":  # LeRobot's processor knows of nothing but ranges
        _expect_ranges(found, raw)
    ends = ("q01", "q99") if raw.keywords.get("use_percentiles") else ("min", "max")
    statistics, parts, keywords = raw.embodiment.statistics, raw.embodiment.modality, raw.keywords
    relative = relative_keys(parts, raw.relative)
    video = parts.get("video", {})
    wanted = video.get("modality_keys") or [mapping.get(camera, camera) for camera in spec.cameras]
    return GrootAssets(
        Units(
            affine(found, statistics, parts, "state", ends, len(spec.state_names)),
            affine(found, statistics, parts, "action", ends, len(spec.action_names), relative),
            *_anchors(found, spec, raw, relative),
        ),
        raw.slot,
        camera_order(found.folder, wanted, spec, mapping),
        (geometry or _geometry)(keywords),
        max(1, len(video.get("delta_indices") or [0])),
        _trained_ticks(found, parts, statistics, relative),
        bool(keywords.get("clip_outliers", True)),
        bool(keywords.get("formalize_language", True)),
        "QUANTILES" if ends[0] == "q01" else "MIN_MAX",
        raw.processor,
        raw.embodiment if raw.new else None,
    )


def _expect_ranges(found: Checkpoint, raw: _Raw) -> None:
    """Raise CheckpointError where a part is encoded by something else than its range."""
    for what in ("state", "action"):
        config = raw.embodiment.modality.get(what, {})
        waves = config.get("sin_cos_embedding_keys") if raw.keywords.get("apply_sincos_state_encoding") else None
        for keys, how in (
            (waves, "encoded as sine and cosine"),
            (config.get("mean_std_embedding_keys"), "normalised by mean and deviation"),
        ):
            if keys:
                raise CheckpointError(f"{found.folder}: {what} parts {keys} are {how}, which is not supported")


@dataclass(frozen=True, slots=True)
class _Raw:
    """One embodiment's files, in one form."""

    embodiment: Described
    keywords: dict[str, Any]
    slot: int
    relative: bool  # the processor uses relative actions, in the parts that say so
    processor: str | None = None
    new: bool = False  # the checkpoint does not know the embodiment


def _nvidia(
    found: Checkpoint,
    tag: str,
    spec: TaskSpec,
    dataset: str | None,
    wanted: Mapping[str, Any] | None,
    known: Mapping[str, int] | None,
) -> _Raw:
    statistics, processor = (_json(found, name) or {} for name in ("statistics.json", "processor_config.json"))
    keywords = processor.get("processor_kwargs", {})
    if tag in statistics and processor:
        embodiment = Described(statistics[tag], keywords.get("modality_configs", {}).get(tag, {}))
    elif tag not in statistics and dataset:
        others = keywords.get("modality_configs", {})
        idle = [] if keywords.get("use_relative_action") else [o for o in others if relative_keys(others[o], True)]
        if wanted is not None and idle:
            raise CheckpointError(
                f"policy.relative: {found.folder} switches relative actions off (use_relative_action) of {idle}, and "
                "would switch them on for all"
            )
        embodiment = described(spec, dataset, wanted)
    else:
        raise CheckpointError(
            f"{found.folder}: no normalisation statistics of embodiment {tag!r} (statistics.json has "
            f"{sorted(statistics)}); to start a new embodiment from a dataset's, set policy.statistics to its folder"
        )
    slots = {**(known or {}), **(_json(found, "embodiment_id.json") or {})}
    if tag not in slots:
        raise CheckpointError(f"{found.folder}: embodiment tag {tag!r} is not in embodiment_id.json: {sorted(slots)}")
    relative = wanted is not None or bool(keywords.get("use_relative_action"))
    return _Raw(embodiment, keywords, int(slots[tag]), relative, new=tag not in statistics)


def described(spec: TaskSpec, dataset: str, relative: Mapping[str, Any] | None) -> Described:
    """A LeRobot dataset's statistics, part by part as its modality.json says (whole vectors without one).

    relative: `policy.relative`, whose ranges are those of the parts that it makes relative.
    """
    meta = Path(dataset).expanduser() / "meta"
    if not (meta / "stats.json").is_file():
        raise CheckpointError(f"policy.statistics={dataset}: no LeRobot dataset with statistics (meta/stats.json)")
    stats = json.loads((meta / "stats.json").read_text())
    said = json.loads((meta / "modality.json").read_text()) if (meta / "modality.json").is_file() else {}
    anchors = None if relative is None else wanted_anchors(spec, relative)
    alone: dict[str, Any] = {"state": {"all": {}}, "action": {"all": {}}}
    if anchors is not None:
        parts = zip(alone, split(anchors, len(spec.state_names), len(spec.action_names)), strict=True)
        alone = {what: {part.name: {"start": part.first, "end": part.end} for part in of} for what, of in parts}
    statistics: dict[str, Any] = {}
    for what, column in (("state", "observation.state"), ("action", "action")):
        entries = said.get(what) or alone[what]
        statistics[what] = {name: _part(stats, entry, column, dataset) for name, entry in entries.items()}
    states, actions = laid(statistics["state"]), laid(statistics["action"])
    ticks: list[int] = []
    if anchors is not None:
        actions = [anchored(part, anchors, states) for part in actions]
        statistics["relative_action"], ticks = _measured(actions, relative), list(range(len(relative["low"])))
    cameras = list(said.get("video", spec.cameras))
    return Described(statistics, modality_of(cameras, [part.name for part in states], actions, ticks))


def _measured(parts: Sequence[Part], relative: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of relative actions from the ranges that `policy.relative` has, a row each tick."""
    low, high = (np.array([list(row) for row in relative[end]], np.float64) for end in ("low", "high"))
    values = {"min": low, "max": high, "mean": (low + high) / 2, "std": (high - low) / 2, "q01": low, "q99": high}
    relative_parts = [part for part in parts if part.state is not None]
    return {p.name: {k: x[:, p.first : p.end].tolist() for k, x in values.items()} for p in relative_parts}


def _part(stats: dict[str, Any], entry: dict[str, Any], column: str, dataset: str) -> dict[str, list[float]]:
    key = entry.get("original_key", column)
    if key not in stats:
        raise CheckpointError(f"policy.statistics={dataset}: no statistics of column {key!r}")
    names = [name for name in ("min", "max", "mean", "std", "q01", "q99") if name in stats[key]]
    span = slice(entry.get("start"), entry.get("end"))
    return {name: np.atleast_1d(np.asarray(stats[key][name], np.float64))[span].tolist() for name in names}


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
    return _Raw(
        Described(statistics, modality),
        {**pack, **encode},
        slot,
        _decodes_relative(found, modality),
        encode.get("model_name"),
    )


def _decodes_relative(found: Checkpoint, modality: dict[str, Any]) -> bool:
    """Does LeRobot's postprocessor add the state? Raises CheckpointError where the preprocessor says something else."""
    steps = (_json(found, POSTPROCESSOR) or {}).get("steps", [])
    config = next((s["config"] for s in steps if s.get("registry_name") == DECODE), {})
    used, parts = bool(config.get("use_relative_action")), list(relative_keys(modality, True))
    if parts and not used:
        raise CheckpointError(
            f"{found.folder}: {PREPROCESSOR} has relative action parts {parts}, {POSTPROCESSOR} "
            f"use_relative_action={str(used).lower()}: which one?"
        )
    return used


def _anchors(
    found: Checkpoint, spec: TaskSpec, raw: _Raw, relative: dict[str, Any]
) -> tuple[Anchors | None, tuple[int, ...]]:
    """What actions are relative to, and which of them as poses: by GR00T's parts, else by LeRobot's generic steps
    before them."""
    anchors, poses = part_anchors(found.folder, raw.embodiment.modality, raw.embodiment.statistics, relative)
    if anchors is None and found.config.get("type") == "groot":
        anchors = anchors_of_steps(found, spec, (PACK,), (DECODE, UNPACK))
        if anchors is not None:
            log.warning("%s: relative actions in statistics of absolute ones, as it was trained", found.folder)
        return anchors, ()
    if anchors is not None and (problem := misplaced(anchors, spec)):
        raise CheckpointError(f"{found.folder}: {problem}")
    return anchors, poses


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


def affine(
    found: Checkpoint, statistics: dict, parts: dict, what: str, ends: tuple[str, str], dims: int, relative: Any = ()
) -> Affine:
    """The range `ends` onto [−1, 1], of relative action parts their own, by tick; a dim that never moved is 0 as a
    state, its value as an action."""
    keys = parts.get(what, {}).get("modality_keys", [])
    absent = [key for key in keys if not set(ends) <= set(statistics.get(what, {}).get(key, {}))]
    which = f"normalisation statistics {list(ends)} of {what}"
    if not keys or absent:
        raise CheckpointError(f"{found.folder}: no {which} {absent or ''}".rstrip())
    of_keys = [
        relative_range(found.folder, statistics, key)
        if key in relative
        else [np.atleast_2d(statistics[what][key][end]) for end in ends]
        for key in keys
    ]
    ticks = max(len(low) for low, _ in of_keys)
    try:
        rows = [[np.broadcast_to(x, (ticks, x.shape[-1])) for x in ends_of_key] for ends_of_key in of_keys]
        low, high = (np.concatenate(column, axis=-1) for column in zip(*rows, strict=True))
    except ValueError as error:
        raise CheckpointError(f"{found.folder}: {which}: {error}") from None
    if low.shape[-1] != dims or high.shape != low.shape:
        raise CheckpointError(f"{found.folder}: statistics of {what} have {low.shape[-1]} dims, the task has {dims}")
    for wrong, said in (
        (~(np.isfinite(low) & np.isfinite(high)), "hold NaN or Inf"),
        (high < low, f"{ends[1]} is below {ends[0]}"),
    ):
        if wrong.any():
            dims_of = sorted({int(k) for k in np.nonzero(wrong)[-1]})
            raise CheckpointError(f"{found.folder}: {which}: {said} in dims {dims_of}")
    # Of a relative part a dim that never moved at a tick is 0 to the model, as the library has it.
    never = NEVER_MOVED if what == "state" else np.inf if relative else 1e-8
    half = np.where(high <= low, never, (high - low) / 2)
    offset = np.where(high <= low, low, (low + high) / 2)
    return Affine(*(x.squeeze(0).tolist() if ticks == 1 else x.tolist() for x in (offset, half)))


def _trained_ticks(found: Checkpoint, parts: dict, statistics: dict, relative: dict[str, Any]) -> int | None:
    """Ticks of a chunk that were trained, None where all are. CheckpointError where statistics by tick are of fewer."""
    ticks = len(parts.get("action", {}).get("delta_indices") or []) or None
    rows = {key: len(relative_range(found.folder, statistics, key)[0]) for key in relative}
    for key, n in rows.items():
        if 1 < n < (ticks or 1):
            raise CheckpointError(
                f"{found.folder}: relative_action of {key!r} has {n} rows, {ticks} ticks were trained"
            )
    return ticks or min((n for n in rows.values() if n > 1), default=None)


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
