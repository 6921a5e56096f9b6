"""Tensors of published policy parameters: one safetensors file a version. run.versions knows which of them are whole.

The trainer publishes; the policy server watches `latest.json` and swaps; the gateway hands the same file to actors
with a local policy. Only trainable tensors travel, with a hash of the frozen rest: both sides know they share a base.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
from serl_launcher.tensor_files import Pending, is_finite, raw_bytes, write_tensors

BEST = "best"  # folder of a fine-tuning run beside params/: the version of the lowest held-out loss
Upload = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]  # (tensors, like) -> copies of them
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
            digest.update(raw_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, a tensor at a time from whichever device. OSError when the disk refuses."""
    write_tensors(path, {name: Pending.of(tensor) for name, tensor in tensors.items()}, metadata)


def publish(
    params_dir: Path,
    tensors: Mapping[str, Tensor],
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
    try:
        write_whole(path, lambda part: save_tensors(tensors, part, metadata), durable=True)
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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a published file or a checkpoint: each is read when it is asked for, into memory of its own.

    The file stays open, and so readable where it is deleted meanwhile. DamagedFileError names one that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _reading(path):
            # Ordinary reads: pages of a mapped file would count as a second copy of what is copied from them.
            self._file = safe_open(path, framework="pt", backend="pread")
            self._names = dict.fromkeys(self._file.keys())  # ordered, and quick to ask
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with _reading(self._path):
            return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Renamed(Mapping[str, Tensor]):
    """Some tensors of another mapping, which are not read before they are asked for. names: name here -> name there."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._there = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._there[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._there

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)


def read_tensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a published file; of a checkpoint's, what would be published of it: the average.

    Tensors are read as they are asked for (`StoredTensors`). Checksums are compared by who finds the file.
    """
    stored = StoredTensors(path)
    if not _of_checkpoint(path):
        return stored, stored.metadata
    base = checkpoints.read_state(path.parent).get("base")
    averaged = {name.removeprefix(AVERAGED): name for name in stored if name.startswith(AVERAGED)}
    return Renamed(stored, averaged), stored.metadata | ({"base_sha256": base} if base else {})


def version_of(path: Path) -> int:
    """The policy version that a published file says it is; 0 where it says none, as a checkpoint's."""
    return int(StoredTensors(path).metadata.get("version", 0))


def tensor_names(path: Path) -> set[str]:
    """Names in a published file; nothing of it is read but the header. DamagedFileError."""
    return set(StoredTensors(path))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from None


def _of_checkpoint(path: Path) -> bool:
    return path.name == checkpoints.TENSORS and (path.parent / checkpoints.MANIFEST).exists()


def checked_tensors(
    want: dict[str, Tensor], path: Path, base: str | None = None, upload: Upload | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a published file that fit `want` exactly, with its dtypes and devices, and the file's metadata.

    Nothing is changed: a file can be made ready beside a policy that is in use. upload: how they come to a device
    without holding up what it does (serving.upload). Raises ValueError naming the tensors that do not fit, or both
    hashes when the frozen base differs.
    """
    tensors, metadata = _fitting(want, path, base)
    return (upload or _moved)(tensors, want), metadata


def _moved(tensors: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name].to(device=p.device, dtype=p.dtype) for name, p in want.items()}


def _fitting(want: Mapping[str, Tensor], path: Path, base: str | None) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    tensors, metadata = read_tensors(path)
    problems = describe_mismatch(want, tensors)
    if problems:
        raise ValueError(f"{path.name} does not fit this policy: " + "; ".join(problems))
    if base is not None:
        check_base(path, metadata, base)
    return tensors, metadata


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
    tensors, metadata = _fitting(want, path, base)
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


def describe_mismatch(want: Mapping[str, Tensor], got: Mapping[str, Tensor], limit: int = 5) -> list[str]:
    """What keeps `got` from filling `want`, in words; empty when it fits exactly and every value is finite."""
    found = [f"missing {name}" for name in want if name not in got]
    found += [f"unknown {name}" for name in got if name not in want]
    for name in want.keys() & got.keys():
        theirs = got[name]
        if want[name].shape != theirs.shape:
            found.append(f"{name}: expected shape {tuple(want[name].shape)}, got {tuple(theirs.shape)}")
        elif not is_finite(theirs):
            found.append(f"{name}: holds NaN or Inf")
    return found if len(found) <= limit else [*found[:limit], f"and {len(found) - limit} more"]
