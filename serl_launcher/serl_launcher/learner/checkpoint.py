"""Checkpoints of the trainer: everything that resuming needs, published by a manifest that is written last.

`runs/<name>/checkpoints/step_000900/` holds tensors.safetensors (parameters, average), optimizer.pt, state.json
(counters, random states, stage progress, policy version) and manifest.json: without it a folder never existed.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from serl_launcher.run.files import sync
from serl_launcher.run.parameters import CHECKPOINT_TENSORS, save_tensors

FILES = (CHECKPOINT_TENSORS, "optimizer.pt", "state.json")
RAW = "raw."  # what the policy's names begin with among the tensors; of their average it is AVERAGED


def save(
    root: Path, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint, then drop all but the newest `keep`. `state` must be JSON; returns the folder.

    OSError when the disk refuses: nothing of it is left then.
    """
    folder = root / f"step_{step:06d}"
    part = root / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write(part, step, tensors, optimizer, state)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # half a checkpoint would keep a full disk full
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    for old in complete(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def _write(part: Path, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]) -> None:
    save_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, part / FILES[0])
    _save_optimizer(optimizer, part / FILES[1])
    (part / FILES[2]).write_text(json.dumps(state))
    manifest = {"step": step, "files": {name: (part / name).stat().st_size for name in FILES}}
    for name in FILES:
        sync(part / name)
    (part / "manifest.json").write_text(json.dumps(manifest))
    sync(part / "manifest.json")


def _save_optimizer(optimizer: dict[str, Any], path: Path) -> None:
    """torch.save, whose zip writer puts an error of its own in front of what the disk said."""
    try:
        with path.open("wb") as file:
            torch.save(optimizer, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def complete(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first: the manifest is there and every file has the size it names."""
    found = []
    for folder in sorted(root.glob("step_*")):
        manifest = folder / "manifest.json"
        if manifest.exists():
            sizes = json.loads(manifest.read_text())["files"]
            if all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in sizes.items()):
                found.append(folder)
    return found


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """tensors, optimizer state, state of a whole checkpoint."""
    optimizer = torch.load(folder / FILES[1], weights_only=True)
    return load_file(folder / FILES[0]), optimizer, read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The state alone."""
    return json.loads((folder / FILES[2]).read_text())
