"""Which of the trainer's checkpoints are whole, and what their counters say. Torch-free; learner.checkpoint writes.

    checkpoints/step_000900/: tensors.safetensors, optimizer.pt, state.json; manifest.json with their sizes and sha256

A folder gets its name once everything in it is on disk, so one that is not whole was damaged afterwards. It is named,
never deleted, and the newest whole one before it is used. Of the whole ones `superfluous` go, but none that is being
read.
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serl_launcher.run.files import DamagedFileError, read_sealed, sha256_of

log = logging.getLogger(__name__)
TENSORS, OPTIMIZER, STATE = FILES = ("tensors.safetensors", "optimizer.pt", "state.json")
MANIFEST = "manifest.json"
GONE = ".gone"  # suffix of a checkpoint that is being deleted


def folders(root: Path) -> list[Path]:
    """Every checkpoint, whole or not, oldest first."""
    found = [path for path in root.glob("step_*") if path.is_dir() and path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The trainer step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def complete(root: Path) -> list[Path]:
    """Checkpoints that look whole, oldest first: a manifest, and files of the sizes that it names. Reads no tensors."""
    return [folder for folder in folders(root) if problem(folder, sums=()) is None]


def superfluous(steps: Sequence[int], latest: int, every: int | None = None, best: int | None = None) -> list[int]:
    """Which of these checkpoints go, by their steps, ascending.

    The newest `latest` stay (at least one); of every further `every` steps the first one; and the newest at or before
    step `best`, that of the best version: training can go back to it.
    """
    stay = set(steps[-max(1, latest) :])
    stay |= {
        step for before, step in zip([0, *steps], steps, strict=False) if every and step // every > before // every
    }
    stay |= {max((step for step in steps if best is not None and step <= best), default=-1)}
    return [step for step in steps if step not in stay]


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Meanwhile no process deletes this checkpoint. OSError where it is gone."""
    with (folder / MANIFEST).open("rb") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        yield


def delete(folder: Path) -> bool:
    """Delete a checkpoint, unless somebody reads it: False then. A kill leaves it whole, or by a name that says so."""
    with (folder / MANIFEST).open("r+b") as manifest:
        try:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        gone = folder.with_name(f".{folder.name}{GONE}")
        shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(folder.rename(gone))
    return True


def whole(root: Path, names: Sequence[str] = FILES) -> Iterator[Path]:
    """Whole checkpoints, newest first; `names` are compared with their checksums. What is damaged is logged."""
    for folder in reversed(folders(root)):
        if (found := problem(folder, names)) is None:
            yield folder
        else:
            log.warning("%s; it stays there, and the checkpoint before it is looked at", found)


def problem(folder: Path, sums: Sequence[str] = FILES) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when nothing is. sums: files whose checksums are compared.

    The manifests of older releases have no checksums: their files are compared by size alone.
    """
    manifest = folder / MANIFEST
    try:
        body = read_sealed(manifest, ["step", "files", "sha256"])
        if body is None:
            return f"{manifest} is missing"
        sizes, digests = {name: int(body["files"][name]) for name in FILES}, dict(body.get("sha256", {}))
    except DamagedFileError as damage:
        return str(damage)
    except (ValueError, KeyError, TypeError):
        return f"{manifest} is damaged: expected the sizes of {', '.join(FILES)}"
    for name, size in sizes.items():
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size != size:
                return f"{path} is damaged: expected a file of {size} bytes"
            if name in sums and name in digests and sha256_of(path) != digests[name]:
                return f"{path} is damaged: it does not match its sha256"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The counters of a whole checkpoint. DamagedFileError names the file."""
    path = folder / STATE
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from None
