"""Tensors of published policy parameters: one safetensors file a version. run.versions knows which of them are whole.

The trainer publishes; the policy server watches `latest.json` and swaps; the gateway hands the same file to actors
with a local policy. Only trainable tensors travel, with a hash of the frozen rest: both sides know they share a base.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from serl_launcher.run import checkpoints
from serl_launcher.run.files import DamagedFileError, sha256_of, write_whole
from serl_launcher.run.record import short_origin
from serl_launcher.run.versions import (
    LATEST,
    PublishedVersion,
    check_file,
    damages,
    file_path,
    keep_newest,
    keep_only,
    newest_whole,
    take_back,
    write_entry,
)

BEST = "best"  # folder of a fine-tuning run beside params/: the version of the lowest held-out loss
AVERAGED = "averaged."  # what the names of the averaged parameters begin with in a trainer's checkpoint


def published_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The tensors of a policy that are published: those that receive gradients."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def base_sha256(policy: nn.Module) -> str:
    """Hash over names, shapes and values of what an action depends on and is not published: frozen weights, buffers.

    A published tensor has every name that the model knows it by: a tied head moves with its embedding.
    """
    dead = policy.dead_parameters() if hasattr(policy, "dead_parameters") else set()
    published = {id(p) for p in published_tensors(policy).values()}
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict(keep_vars=True).items()):
        if name not in dead and id(tensor) not in published:
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. OSError when the disk refuses: the library gives only the words of one."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def publish(
    params_dir: Path,
    tensors: dict[str, Tensor],
    *,
    version: int,
    step: int,
    base: str,
    policy: str,
    now: float,
    keep: int,
) -> PublishedVersion:
    """Write version `version` whole or not at all, then tell of it; on disk when this returns. OSError: it is refused.

    Then versions older than the newest `keep` go, but for the best evaluated one.
    """
    path = file_path(params_dir, version)
    metadata = {"version": str(version), "step": str(step), "base_sha256": base, "policy": policy}
    metadata["origin"] = short_origin(params_dir.parent)
    on_host = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        write_whole(path, lambda part: save_tensors(on_host, part, metadata), durable=True)
        entry = PublishedVersion(version, step, path.name, path.stat().st_size, sha256_of(path), now)
        write_entry(params_dir, entry)
    except OSError:
        take_back(params_dir, version)
        raise
    keep_newest(params_dir, keep)
    return entry


def store(params_dir: Path, version: int, blob: bytes, now: float) -> PublishedVersion:
    """Keep a published file that came over the wire (its hash was checked there), and no other.

    A learner that begins anew counts from 1 again, so the newest to come is not always the highest number.
    """
    path = file_path(params_dir, version)
    write_whole(path, lambda part: part.write_bytes(blob))
    entry = PublishedVersion(version, -1, path.name, path.stat().st_size, sha256_of(path), now)
    write_entry(params_dir, entry)
    keep_only(params_dir, {version})
    return entry


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a published file; of a checkpoint's, what would be published of it: the average.

    DamagedFileError names a file that cannot be read. Checksums are compared by who finds the file.
    """
    with _opened(path) as f:
        names = {name: name for name in f.keys()}  # noqa: SIM118
        if _of_checkpoint(path):
            names = {n.removeprefix(AVERAGED): n for n in names if n.startswith(AVERAGED)}
        metadata = f.metadata() or {}
        if _of_checkpoint(path) and (base := checkpoints.read_state(path.parent).get("base")):
            metadata["base_sha256"] = base
        return {short: f.get_tensor(name) for short, name in names.items()}, metadata


def version_of(path: Path) -> int:
    """The policy version that a published file says it is; 0 where it says none, as a checkpoint's."""
    with _opened(path) as f:
        return int((f.metadata() or {}).get("version", 0))


def tensor_names(path: Path) -> set[str]:
    """Names in a published file; nothing of it is read but the header. DamagedFileError."""
    with _opened(path) as f:
        return set(f.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from None


def _of_checkpoint(path: Path) -> bool:
    return path.name == checkpoints.TENSORS and (path.parent / checkpoints.MANIFEST).exists()


def checked_tensors(want: dict[str, Tensor], path: Path, base: str | None = None) -> tuple[dict, dict[str, str]]:
    """Tensors of a published file that fit `want` exactly, with its dtypes and devices, and the file's metadata.

    Nothing is changed: a file can be made ready beside a policy that is in use. Raises ValueError naming the tensors
    that do not fit, or both hashes when the frozen base differs.
    """
    tensors, metadata = read_tensors(path)
    problems = describe_mismatch(want, tensors)
    if problems:
        raise ValueError(f"{path.name} does not fit this policy: " + "; ".join(problems))
    if base is not None:
        check_base(path, metadata, base)
    return {name: tensors[name].to(device=p.device, dtype=p.dtype) for name, p in want.items()}, metadata


def check_base(path: Path, metadata: dict[str, str], base: str) -> None:
    """Raise ValueError with both hashes unless a file's parameters were trained on this frozen base, in these units.

    A checkpoint of an older release names none, and is taken.
    """
    theirs = metadata.get("base_sha256", "none")
    if theirs != base and not (theirs == "none" and _of_checkpoint(path)):
        raise ValueError(
            f"{path} was trained on another frozen base or in other units: expected {base[:12]}, got {theirs[:12]}; "
            "compare policy.seed, policy.checkpoint and the task's state and action ranges with those of its run"
        )


@torch.no_grad()
def load_into(policy: nn.Module, path: Path, base: str | None = None) -> dict[str, str]:
    """Fill a policy's trainable tensors from a published file, strictly; returns the metadata.

    Raises ValueError as `checked_tensors` does.
    """
    want = published_tensors(policy)
    tensors, metadata = checked_tensors(want, path, base)
    for name, p in want.items():
        p.copy_(tensors[name])
    return metadata


def find_parameters(path: str | Path) -> Path:
    """The parameters file that `checkpoint_path` means: a file, a run folder, its params/ or one of its checkpoints.

    Compared with the checksum that stands beside it; of a folder of versions it is the newest whole one. Raises
    FileNotFoundError that says what was looked for, DamagedFileError where nothing whole is there.
    """
    path = Path(path)
    if path.is_file():
        return _checked(path)
    for folder in (path / "params", path):
        if (folder / LATEST).exists() or PublishedVersion.read(folder) is not None:
            entry = newest_whole(folder)
            if entry is None:
                raise DamagedFileError(f"checkpoint_path={path}: no version is whole: {'; '.join(damages(folder))}")
            return folder / entry.file
    if (path / checkpoints.MANIFEST).exists():
        return _checked(path / checkpoints.TENSORS)
    if (path / "config.json").is_file():
        raise FileNotFoundError(
            f"checkpoint_path={path}: a checkpoint's folder, no parameters of a run: give it as "
            f"policy.checkpoint={path} with the policy= of its type"
        )
    raise FileNotFoundError(
        f"checkpoint_path={path}: no parameters there; expected a *.safetensors file, a run folder holding "
        "params/latest.json, or a checkpoint folder such as runs/<name>/checkpoints/step_000900"
    )


def find_version(run: Path, version: str | None) -> Path:
    """Parameters of a run folder: the newest (None), `best` of a fine-tuning run, or a file's name in params/.

    Raises as `find_parameters`.
    """
    if version == BEST and not (run / BEST).is_dir():
        raise FileNotFoundError(
            f"{run}: no folder {BEST}/; fine-tuning keeps one where episodes are held out (sft.held_out)"
        )
    return find_parameters(run if version is None else run / BEST if version == BEST else run / "params" / version)


def _checked(path: Path) -> Path:
    """The path, once compared with a checkpoint's manifest or the entries of a params folder."""
    if not _of_checkpoint(path):
        check_file(path)
    elif problem := checkpoints.problem(path.parent, sums=(path.name,)):
        raise DamagedFileError(problem)
    return path


def describe_mismatch(want: dict[str, Tensor], got: dict[str, Tensor], limit: int = 5) -> list[str]:
    """What keeps `got` from filling `want`, in words; empty when it fits exactly and every value is finite."""
    found = [f"missing {name}" for name in want if name not in got]
    found += [f"unknown {name}" for name in got if name not in want]
    for name in want.keys() & got.keys():
        if want[name].shape != got[name].shape:
            found.append(f"{name}: expected shape {tuple(want[name].shape)}, got {tuple(got[name].shape)}")
        elif not torch.isfinite(got[name]).all():
            found.append(f"{name}: holds NaN or Inf")
    return found if len(found) <= limit else [*found[:limit], f"and {len(found) - limit} more"]
