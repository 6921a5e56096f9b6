"""Published policy parameters on disk: one safetensors file a version, and the pointer to the newest.

The trainer publishes; the policy server watches `latest.json` and swaps; the gateway hands the same file to actors
with a local policy. Only trainable tensors travel, with a hash of the frozen rest: both sides know they share a base.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from serl_launcher.run.files import write_json, write_whole
from serl_transport.contract.bounds import check_name

# Of a trainer's checkpoint (learner.checkpoint), which `checkpoint_path` may name as well.
CHECKPOINT_TENSORS = "tensors.safetensors"
AVERAGED = "averaged."  # what the names of the averaged parameters begin with in it


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """What `latest.json` says of a version."""

    version: int
    step: int  # trainer step it was taken at; -1: not known
    file: str  # name inside params/
    bytes: int
    sha256: str  # of the file
    time: float  # unix seconds of publishing

    @classmethod
    def read(cls, params_dir: Path) -> "PublishedVersion | None":
        """The newest version, or None before the first."""
        try:
            entry = cls(**json.loads((params_dir / "latest.json").read_text()))
        except FileNotFoundError:
            return None
        check_name(f"{params_dir / 'latest.json'}: file", entry.file)
        return entry


def published_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The tensors of a policy that are published: those that receive gradients."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def base_sha256(policy: nn.Module) -> str:
    """Hash over names, shapes and values of what an action depends on and is not published: frozen weights, buffers."""
    dead = policy.dead_parameters() if hasattr(policy, "dead_parameters") else set()
    left_out = published_tensors(policy).keys() | dead
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        if name not in left_out:
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
    """Write version `version` whole or not at all, then point at it; files older than the newest `keep` go."""
    path = params_dir / f"v{version:06d}.safetensors"
    metadata = {"version": str(version), "step": str(step), "base_sha256": base, "policy": policy}
    on_host = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_whole(path, lambda part: save_tensors(on_host, part, metadata))
    entry = _point_at(path, version, step, now)
    for old in sorted(params_dir.glob("v*.safetensors"))[:-keep]:
        old.unlink()
    return entry


def store(params_dir: Path, version: int, blob: bytes, now: float) -> PublishedVersion:
    """Keep a published file that came over the wire (its hash was checked there), and point at it."""
    path = params_dir / f"v{version:06d}.safetensors"
    write_whole(path, lambda part: part.write_bytes(blob))
    return _point_at(path, version, -1, now)


def _point_at(path: Path, version: int, step: int, now: float) -> PublishedVersion:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = PublishedVersion(version, step, path.name, path.stat().st_size, digest, now)
    write_json(path.with_name("latest.json"), asdict(entry))
    return entry


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a published file; of a checkpoint's, what would be published of it: the average."""
    with safe_open(path, framework="pt") as f:
        names = {name: name for name in f.keys()}  # noqa: SIM118
        if _of_checkpoint(path):
            names = {n.removeprefix(AVERAGED): n for n in names if n.startswith(AVERAGED)}
        return {short: f.get_tensor(name) for short, name in names.items()}, f.metadata() or {}


def tensor_names(path: Path) -> set[str]:
    """Names in a published file; nothing of it is read but the header."""
    with safe_open(path, framework="pt") as f:
        return set(f.keys())


def _of_checkpoint(path: Path) -> bool:
    return path.name == CHECKPOINT_TENSORS and (path.parent / "manifest.json").exists()


def checked_tensors(want: dict[str, Tensor], path: Path, base: str | None = None) -> tuple[dict, dict[str, str]]:
    """Tensors of a published file that fit `want` exactly, with its dtypes and devices, and the file's metadata.

    Nothing is changed: a file can be made ready beside a policy that is in use. Raises ValueError naming the tensors
    that do not fit, or both hashes when the frozen base differs.
    """
    tensors, metadata = read_tensors(path)
    problems = describe_mismatch(want, tensors)
    if problems:
        raise ValueError(f"{path.name} does not fit this policy: " + "; ".join(problems))
    if base is not None and metadata.get("base_sha256") != base and not _of_checkpoint(path):  # which names none
        theirs = metadata.get("base_sha256", "none")
        raise ValueError(
            f"{path.name} was trained on another frozen base: expected {base[:12]}, got {theirs[:12]}; "
            "check policy.seed and checkpoint_path on both sides"
        )
    return {name: tensors[name].to(device=p.device, dtype=p.dtype) for name, p in want.items()}, metadata


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

    Raises FileNotFoundError that says what was looked for.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "params", path):
        latest = PublishedVersion.read(folder)
        if latest is not None:
            return folder / latest.file
    if _of_checkpoint(path / CHECKPOINT_TENSORS) and (path / CHECKPOINT_TENSORS).exists():
        return path / CHECKPOINT_TENSORS
    raise FileNotFoundError(
        f"checkpoint_path={path}: no parameters there; expected a *.safetensors file, a run folder holding "
        "params/latest.json, or a checkpoint folder such as runs/<name>/checkpoints/step_000900"
    )


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
