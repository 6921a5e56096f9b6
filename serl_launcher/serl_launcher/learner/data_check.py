"""What is wrong with a LeRobot dataset for a task, before hours are spent: one line a finding.

tools/preflight.py prints them. Only metadata is read, no image is decoded.
"""

from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.learner.sft import Columns
from serl_launcher.run.files import read_json
from serl_transport.contract.specs import TaskSpec

NEEDED = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}


def findings(folder: Path, spec: TaskSpec, columns: Columns, mode: str = "MEAN_STD") -> list[str]:
    """Everything that keeps the dataset from training a policy for `spec`; empty when nothing is wrong."""
    info = read_json(folder / "meta" / "info.json")
    if info is None:
        return [f"{folder}: no meta/info.json, so no LeRobot dataset"]
    features, stats = info["features"], read_json(folder / "meta" / "stats.json") or {}
    found = [*_images(features, spec, columns), *_vectors(features, stats, spec, columns, NEEDED[mode])]
    if abs(float(info["fps"]) - spec.control_hz) > 1e-6:
        found.append(
            f"fps: the dataset has {info['fps']}, the task runs at {spec.control_hz:g}: chunks would be stretched"
        )
    if not info.get("total_frames"):
        found.append("the dataset holds no frames")
    return found + _prompts(folder, spec)


def _images(features: dict[str, Any], spec: TaskSpec, columns: Columns) -> list[str]:
    found = []
    for camera, key in columns.images.items():
        feature = features.get(key)
        if feature is None:
            have = sorted(k for k, f in features.items() if f["dtype"] in ("image", "video"))
            found.append(f"camera {camera!r}: no column {key!r}; the dataset has {have}")
        elif feature["dtype"] not in ("image", "video"):
            found.append(f"camera {camera!r}: {key} is {feature['dtype']}, expected image or video")
        elif tuple(feature["shape"][:2]) != tuple(spec.cameras.get(camera, feature["shape"][:2])):
            found.append(f"camera {camera!r}: {tuple(feature['shape'][:2])}, the task has {spec.cameras[camera]}")
    return found


def _vectors(
    features: dict[str, Any], stats: dict[str, Any], spec: TaskSpec, columns: Columns, needed: tuple[str, str]
) -> list[str]:
    found = []
    parts = [("state", columns.state, len(spec.state_names)), ("action", columns.action, len(spec.action_names))]
    for what, slices, dims in parts:
        got = 0
        for key, part in slices:
            feature = features.get(key)
            if feature is None:
                found.append(f"{what}: no column {key!r}")
                continue
            got += len(range(*part.indices(feature["shape"][0])))
            if feature["dtype"] != "float32":
                found.append(f"{what}: {key} is {feature['dtype']}, expected float32")
            found += _statistics(key, stats.get(key), needed)
        if got and got != dims:
            found.append(f"{what}: {got} dims, the task has {dims}")
    return found


def _statistics(key: str, stats: dict[str, Any] | None, needed: tuple[str, str]) -> list[str]:
    missing = [name for name in needed if name not in (stats or {})]
    if missing:
        return [f"statistics: {key} has no {' and '.join(missing)}; recompute meta/stats.json with LeRobot"]
    first, second = (np.asarray(stats[name], np.float64) for name in needed)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return [f"statistics: {key} holds NaN or Inf"]
    spread = second if needed[0] == "mean" else second - first
    flat = np.flatnonzero(spread <= 1e-6)
    if len(flat):
        return [f"statistics: {key} dims {flat.tolist()} never move: any deviation is divided by almost zero"]
    return []


def _prompts(folder: Path, spec: TaskSpec) -> list[str]:
    path = folder / "meta" / "tasks.parquet"
    if not path.is_file():
        return ["prompt: no meta/tasks.parquet"]
    import pandas

    texts = [str(text) for text in pandas.read_parquet(path).index]
    if any(not text.strip() for text in texts):
        return ["prompt: the dataset holds an empty task text"]
    if spec.prompt not in texts:
        return [f"prompt: the task says {spec.prompt!r}, the dataset {texts[:3]}"]
    return []
