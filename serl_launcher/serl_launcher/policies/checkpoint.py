"""A policy checkpoint folder in LeRobot's format, read without building anything: config, tensors, statistics.

policies.loading fills a model from it, each head's saving writes one. Files: config.json, model.safetensors (or shards
with an index), policy_preprocessor.json and policy_postprocessor.json with the normalisation statistics beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from serl_launcher.policies.hub import fetched
from serl_launcher.tensor_files import DTYPES, Pending
from serl_transport.contract.specs import TaskSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # weights, configs, tokenizers
IMAGES = "observation.images."  # what LeRobot's camera features begin with
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
POLICIES = {  # type in config.json -> the yaml of config/policy/ that reads it; LeRobot's groot of N1.5: groot_n1_5
    "pi0": "pi0",
    "pi05": "pi05",
    "groot": "groot_n1_7",
    "Gr00tN1d7": "groot_n1_7",
    "Gr00tN1d6": "groot_n1_6",
    "gr00t_n1_5": "groot_n1_5",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message says which file and why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a checkpoint's pieces lie."""

    folder: Path
    config: dict[str, Any]  # config.json
    files: dict[str, Path]  # tensor name -> file that holds it

    @classmethod
    def find(cls, source: str) -> Checkpoint:
        """Open a local folder or a hub repository. Raises CheckpointError naming the file that is not there."""
        folder = _folder(source)
        config = folder / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{folder}: no config.json; expected a folder that LeRobot's save_pretrained wrote")
        try:
            content = json.loads(config.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{config}: not JSON: {error}") from None
        return cls(folder, content, _tensor_files(folder))

    def expect_type(self, *types: str) -> None:
        """Raise CheckpointError unless config.json names one of these policy types."""
        got = self.config.get("type") or self.config.get("model_type")
        if got not in types:
            reader = f"; policy={POLICIES[got]} reads that" if got in POLICIES else ""
            expected = " or ".join(types)
            raise CheckpointError(f"{self.folder}: expected a checkpoint of type {expected}, got {got!r}{reader}")

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it is stored; in memory of its own, nothing else of the file is."""
        with _opened(self.files[name]) as f:
            return f.get_tensor(name)

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each, one at a time: a file is opened once."""
        for file in sorted({self.files[name] for name in names}):
            with _opened(file) as f:
                for name in names:
                    if self.files[name] == file:
                        yield name, f.get_tensor(name)

    def pending(self, name: str) -> Pending:
        """One tensor, read when it is written elsewhere."""
        with _opened(self.files[name]) as f:
            stored = f.get_slice(name)
            return Pending(DTYPES[stored.get_dtype()], tuple(stored.get_shape()), partial(self.tensor, name))


def _opened(file: Path) -> Any:
    """For reading tensor by tensor, by ordinary reads: pages of a mapped file would count as a second copy."""
    return safe_open(file, framework="pt", backend="pread")


def check_init(init: str, checkpoint: str | None, action_horizon: int | None) -> None:
    """Raise ValueError naming the key, where a policy's beginning is not said or said twice."""
    if init not in ("checkpoint", "random"):
        raise ValueError(f"policy.init: expected 'checkpoint' or 'random', got {init!r}")
    if init == "checkpoint":
        if not checkpoint:
            raise ValueError("policy.checkpoint: expected a folder or a hub name (or ask for policy.init=random)")
        return
    if checkpoint:
        raise ValueError(f"policy.init=random and policy.checkpoint={checkpoint}: which one? set init=checkpoint")
    if type(action_horizon) is not int or action_horizon < 1:
        raise ValueError(
            f"policy.action_horizon: expected a number of ticks with policy.init=random, got {action_horizon}"
        )


def camera_order(folder: Path, wanted: list[str], spec: TaskSpec, mapping: dict[str, str]) -> tuple[str, ...]:
    """The task's cameras in the order `wanted` of the checkpoint's. mapping: the task's camera -> the checkpoint's,
    where names differ. Raises CheckpointError naming cameras without a counterpart."""
    unknown = [camera for camera in mapping if camera not in spec.cameras]
    if unknown:
        raise ValueError(f"policy.cameras: the task has no camera {unknown[0]!r}; it has {sorted(spec.cameras)}")
    of = {mapping.get(camera, camera).removeprefix(IMAGES): camera for camera in spec.cameras}
    wanted = [key.removeprefix(IMAGES) for key in wanted]
    if set(of) != set(wanted):
        raise CheckpointError(
            f"{folder}: cameras: the checkpoint has {wanted}, the task gives {sorted(of)}; map them with policy.cameras"
        )
    return tuple(of[key] for key in wanted)


def visual_features(checkpoint: Checkpoint) -> list[str]:
    """Camera features that a LeRobot config lists, in its order."""
    features = checkpoint.config.get("input_features") or {}
    return [key for key, feature in features.items() if feature.get("type") == "VISUAL"]


def from_hub(get: Callable[..., str], source: str, where: str) -> Path:
    """What `get(local_files_only=…)` fetches. Raises CheckpointError, "`where`, and the hub …"."""
    try:
        return Path(fetched(get, source))
    except ValueError as error:
        raise CheckpointError(f"{where}, and {error}") from None


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise CheckpointError(f"policy.checkpoint={source}: no such folder (and not a hub name of the form owner/name)")
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, source, allow_patterns=PATTERNS)
    return from_hub(fetch, source, f"policy.checkpoint={source}: no such folder")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """tensor name -> file. Raises CheckpointError when weights are absent or torn."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        absent = sorted({name for name in index.values() if not (folder / name).is_file()})
        if absent:
            raise CheckpointError(f"{folder}: {INDEX} names shards that are not there: {', '.join(absent)}")
        return {name: folder / file for name, file in index.items()}
    if not (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder}: no weights; expected {SINGLE} or {INDEX}")
    try:
        with safe_open(folder / SINGLE, framework="pt") as f:
            return {name: folder / SINGLE for name in f.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type for a torn file
        raise CheckpointError(f"{folder / SINGLE}: cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Normalisation of one feature as a LeRobot processor step holds it."""

    mode: str  # MEAN_STD, QUANTILES, QUANTILE10, MIN_MAX or IDENTITY
    values: dict[str, Tensor]  # mean, std, min, max, q01, … float32[dims]


def read_statistics(checkpoint: Checkpoint, file: str, feature: str, kind: str) -> Statistics:
    """Statistics of `feature` (type `kind`: STATE or ACTION) in a processor file.

    Raises CheckpointError when the file, its normaliser or its statistics are absent: without them every action
    would be rescaled in silence.
    """
    step, mode = _normaliser(checkpoint, file, kind)
    values = _stored_values(checkpoint.folder, step, feature)
    if mode != "IDENTITY" and not values:
        raise CheckpointError(
            f"{checkpoint.folder / file}: no normalisation statistics of {feature!r}, which {mode} needs; "
            "policy.statistics=<dataset> takes those of your data for a base"
        )
    return Statistics(mode, values)


def mode_of(checkpoint: Checkpoint, file: str, kind: str) -> str:
    """How a processor file normalises features of type `kind`, whether or not it has statistics."""
    return _normaliser(checkpoint, file, kind)[1]


def _normaliser(checkpoint: Checkpoint, file: str, kind: str) -> tuple[dict[str, Any], str]:
    """A processor file's normaliser, and its mode."""
    path = checkpoint.folder / file
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint.folder}: no {file}, so no normalisation statistics; export the checkpoint with its processors"
        )
    steps = json.loads(path.read_text())["steps"]
    step = next((s for s in steps if s.get("registry_name", "").endswith("normalizer_processor")), None)
    if step is None:
        raise CheckpointError(f"{path}: no normalizer step, so no normalisation statistics")
    return step, step["config"].get("norm_map", {}).get(kind, "IDENTITY")


def _stored_values(folder: Path, step: dict[str, Any], feature: str) -> dict[str, Tensor]:
    name = step.get("state_file")
    if name is None:
        return {}
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder}: no {name}, which holds the normalisation statistics")
    with safe_open(folder / name, framework="pt") as f:
        keys = [key for key in f.keys() if key.rpartition(".")[0] == feature]  # noqa: SIM118
        return {key.rpartition(".")[2]: f.get_tensor(key).to(torch.float32) for key in keys}
