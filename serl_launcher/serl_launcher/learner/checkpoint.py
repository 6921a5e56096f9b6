"""Checkpoints of the trainer: everything that resuming needs, on disk before it gets its name.

`runs/<name>/checkpoints/step_000900/` holds tensors.safetensors (parameters, average), optimizer.pt, state.json
(counters, random states, stage progress, policy version) and manifest.json with their sizes and checksums;
origin.json says which code, config and data made it (run.record).
run.checkpoints tells which are whole.
"""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from serl_launcher.run.checkpoints import (
    FILES,
    GONE,
    MANIFEST,
    OPTIMIZER,
    STATE,
    TENSORS,
    complete,
    delete,
    read_state,
    step_of,
    superfluous,
)
from serl_launcher.run.files import DamagedFileError, make_folder, sha256_of, sync, write_sealed
from serl_launcher.run.parameters import StoredTensors, save_tensors
from serl_launcher.run.record import ORIGIN

PART = ".part"  # suffix of one that is being written
BEFORE = ".before"  # suffix of a checkpoint that makes room for another one of the same step
RAW = "raw."  # what the policy's names begin with among the tensors; of their average it is AVERAGED


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    origin: dict[str, Any] | None = None,
    every: int | None = None,
    best: int | None = None,
) -> Path:
    """Write a checkpoint, then drop those up to it that are superfluous by `keep` (the newest ones), `every` and `best`
    (run.checkpoints.superfluous). `state` must be JSON; returns the folder. origin: what it is made of
    (run.record.origin_of), kept beside the weights.

    On disk when this returns. OSError when the disk refuses: nothing of it is left then, and those before it stay.
    Later steps are left alone: training went on from before them because they are damaged.
    """
    folder = root / f"step_{step:06d}"
    part = root / f".{folder.name}{PART}"
    shutil.rmtree(part, ignore_errors=True)
    make_folder(root, durable=True)
    try:
        part.mkdir()
        _write(part, step, tensors, optimizer, state)
        if origin is not None:
            write_sealed(part / ORIGIN, origin)
        _put_in_place(part, folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # half a checkpoint would keep a full disk full
        raise
    found = {step_of(other): other for other in complete(root) if step_of(other) <= step}
    for old in superfluous(list(found), keep, every, best):
        delete(found[old])
    return folder


def _write(
    part: Path, step: int, tensors: Mapping[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]
) -> None:
    save_tensors(tensors, part / TENSORS)
    _save_optimizer(optimizer, part / OPTIMIZER)
    (part / STATE).write_text(json.dumps(state))
    manifest = {
        "step": step,
        "files": {name: (part / name).stat().st_size for name in FILES},
        "sha256": {name: sha256_of(part / name) for name in FILES},
    }
    for name in FILES:
        sync(part / name)
    write_sealed(part / MANIFEST, manifest)  # and with it the folder's names


def _save_optimizer(optimizer: dict[str, Any], path: Path) -> None:
    """torch.save, whose zip writer puts an error of its own in front of what the disk said."""
    try:
        with path.open("wb") as file:
            torch.save(optimizer, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def finish(root: Path) -> None:
    """Bring back a checkpoint that a kill left aside while another one of the same step took its place, and remove what
    a kill left half written or half deleted."""
    for suffix in (PART, GONE):
        for left in root.glob(f".step_*{suffix}"):
            shutil.rmtree(left)
    _bring_back(root)


def _bring_back(root: Path) -> None:
    for before in root.glob(f".step_*{BEFORE}"):
        folder = root / before.name.removeprefix(".").removesuffix(BEFORE)
        if folder.exists():
            shutil.rmtree(before)
        else:
            os.replace(before, folder)


def _put_in_place(part: Path, folder: Path) -> None:
    _bring_back(folder.parent)
    before = folder.with_name(f".{folder.name}{BEFORE}")
    if folder.exists():
        os.replace(folder, before)
    os.replace(part, folder)
    sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def load(folder: Path, mapped: bool = False) -> tuple[Mapping[str, Tensor], dict[str, Any], dict[str, Any]]:
    """tensors (read as they are asked for), optimizer state on the host, state of a whole checkpoint.

    mapped: the optimizer's file is mapped into memory and not read, for state that goes to a card tensor by tensor; a
    trainer on the host takes over what was read. DamagedFileError where one of an older release is not whole.
    """
    try:
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", mmap=mapped, weights_only=True)
        return StoredTensors(folder / TENSORS), optimizer, read_state(folder)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise DamagedFileError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}") from None
