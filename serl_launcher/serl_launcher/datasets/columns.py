"""Which of a dataset's columns are cameras, state and action, and what their dims are called.

    info.json's features ─┐
    meta/modality.json ───┴▶ Columns: camera ─▶ key and size; state, action ─▶ parts of columns, a name for each dim

modality.json is GR00T's: slices of columns, half-open, start 0 and end 5 are dims 0 … 4. A part's name becomes the
names of its dims, `arm.0 … arm.4`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serl_launcher.datasets.folder import DatasetError

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
DEFAULT = {"state": STATE, "action": ACTION}
Parts = list[tuple[str, slice]]  # column and dims, concatenated


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a dataset's cameras, state and action lie in its rows."""

    cameras: dict[str, tuple[str, tuple[int, int]]]  # camera -> column, (height, width)
    state: Parts
    action: Parts
    state_names: list[str] | None  # a name for each dim; None: the dataset gives none
    action_names: list[str] | None
    described: Path | None  # the modality.json that says so


def read_columns(folder: Path, features: Mapping[str, Any]) -> Columns:
    """As modality.json says, else by LeRobot's own names. Raises DatasetError naming what is missing or wrong."""
    path = folder / "meta" / "modality.json"
    if not path.is_file():
        whole = slice(None)
        state, action = ([(key, whole)] for key in (STATE, ACTION))
        names = [_names(features, key) for key in (STATE, ACTION)]
        return Columns(_all_cameras(folder, features), state, action, *names, None)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not JSON: {error}") from None
    for section in ("state", "action", "video"):
        if not isinstance(content, dict) or not isinstance(content.get(section), dict) or not content[section]:
            raise DatasetError(f"{path}: expected a section {section!r} with at least one entry")
    keys = {
        name: _entry(path, "video", name, e).get("original_key", IMAGES + name) for name, e in content["video"].items()
    }
    cameras = {name: (key, _size(folder, name, key, features)) for name, key in keys.items()}
    parts = [_parts(path, section, content[section], features) for section in ("state", "action")]
    return Columns(cameras, *parts, *(_part_names(content[section]) for section in ("state", "action")), path)


def _all_cameras(folder: Path, features: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, int]]]:
    found = {}
    for key in pictures(features):
        name = key.removeprefix(IMAGES).removeprefix("observation.").replace(".", "_")
        found[name] = (key, _size(folder, name, key, features))
    return found


def pictures(features: Mapping[str, Any]) -> list[str]:
    """Colour pictures; depth maps are none."""
    return [
        key
        for key, feature in features.items()
        if feature["dtype"] in ("image", "video") and not _is_depth(feature) and len(feature["shape"]) == 3
    ]


def _is_depth(feature: Mapping[str, Any]) -> bool:
    info = feature.get("info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map")) or 3 not in feature["shape"]


def _size(folder: Path, camera: str, key: str, features: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) by the feature's names, or by where the 3 channels are."""
    feature = features.get(key)
    if feature is None or feature["dtype"] not in ("image", "video"):
        what = "no column" if feature is None else f"{feature['dtype']}, no pictures, in column"
        raise DatasetError(f"{folder}: camera {camera!r}: {what} {key!r}; it has {pictures(features)}")
    shape, names = [int(n) for n in feature["shape"]], feature.get("names")
    if isinstance(names, list) and len(names) == len(shape) == 3:
        by_name = {str(name).rstrip("s"): n for name, n in zip(names, shape, strict=True)}
        if {"height", "width"} <= by_name.keys() and by_name.get("channel", 3) == 3:
            return by_name["height"], by_name["width"]
    if len(shape) == 3 and shape[2] == 3:
        return shape[0], shape[1]
    if len(shape) == 3 and shape[0] == 3:
        return shape[1], shape[2]
    raise DatasetError(f"{folder}: camera {camera!r}: expected {key} of [h, w, 3] or [3, h, w], got {shape}")


def _names(features: Mapping[str, Any], key: str) -> list[str] | None:
    """The names that LeRobot gives the dims: a list, lists under headings, or name -> place."""
    feature = features.get(key) or {}
    names, dims = feature.get("names"), (feature.get("shape") or [0])[0]
    if isinstance(names, dict):
        values = list(names.values())
        if values and all(isinstance(v, list) for v in values):
            names = [name for group in values for name in group]
        elif values and all(type(v) is int for v in values):
            names = sorted(names, key=names.get)
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    good = isinstance(names, list) and len(names) == dims == len({str(name) for name in names})
    good = good and all(isinstance(name, str) and 0 < len(name) <= 128 and name.isprintable() for name in names)
    return list(names) if good else None


def _entry(path: Path, section: str, name: str, entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise DatasetError(f"{path}: {section}.{name}: expected a mapping, got {entry!r}")
    return entry


def _parts(path: Path, section: str, entries: Mapping[str, Any], features: Mapping[str, Any]) -> Parts:
    parts = []
    for name, entry in entries.items():
        start, end = _entry(path, section, name, entry).get("start"), entry.get("end")
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end:
            raise DatasetError(f"{path}: {section}.{name}: expected 0 <= start < end, got {start} and {end}")
        key = entry.get("original_key", DEFAULT[section])
        have = (features.get(key) or {}).get("shape")
        if have is not None and end > have[0]:
            raise DatasetError(f"{path}: {section}.{name}: ends at dim {end}, column {key!r} has {have[0]}")
        parts.append((key, slice(start, end)))
    return parts


def _part_names(entries: Mapping[str, Any]) -> list[str]:
    return [f"{name}.{k}" for name, entry in entries.items() for k in range(entry["end"] - entry["start"])]
