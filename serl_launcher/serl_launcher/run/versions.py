"""Which policy versions a params/ folder holds, and which are whole. Torch-free; run.parameters has the tensors.

    v000012.safetensors ─▶ v000012.json (its size and sha256) ─▶ latest.json (the same, of the newest)
    kept.json: the best evaluated version, which stays (learner.guard), as does one that an operator pinned (run.acts)

Written in this order, each on disk before the next. Roles watch `latest.json`; what it names is compared with its
checksum before it is used, and where it is damaged the newest whole version before it is taken, and the log says so.
"""

import logging
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from serl_launcher.run.acts import ActsLedger, locked
from serl_launcher.run.files import DamagedFileError, clear, read_sealed, sha256_of, sync, write_sealed
from serl_transport.contract.bounds import check_name

log = logging.getLogger(__name__)
LATEST, KEPT = "latest.json", "kept.json"
_NUMBER = re.compile(r"v(\d+)\.(?:safetensors|json)")


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """What its own file, and `latest.json`, say of a version."""

    version: int
    step: int  # trainer step it was taken at; -1: not known
    file: str  # name inside params/
    bytes: int
    sha256: str  # of the file
    time: float  # unix seconds of publishing

    @classmethod
    def read(cls, params_dir: Path) -> "PublishedVersion | None":
        """The newest version that is told of, whole or not; None before the first."""
        try:
            if (entry := _read(params_dir / LATEST)) is not None:
                return entry
        except DamagedFileError:
            pass  # `newest_whole` names it
        return max(_told(params_dir)[0].values(), key=lambda entry: entry.version, default=None)


def write_entry(params_dir: Path, entry: PublishedVersion) -> None:
    """Tell of a version whose file is on disk."""
    write_sealed(_entry_path(params_dir, entry.version), asdict(entry))
    write_sealed(params_dir / LATEST, asdict(entry))


def newest_whole(params_dir: Path) -> PublishedVersion | None:
    """The newest version whose file has the size and sha256 that are told; None when there is none.

    Reads the file. What is damaged is logged, with what is taken instead. What is found is on disk: it survives a
    power cut, so that an actor may be told of it.
    """
    if not params_dir.is_dir():
        return None
    told, problems = _told(params_dir)
    sync(params_dir)
    whole = None
    for entry in sorted(told.values(), key=lambda entry: -entry.version):
        if (problem := _problem(params_dir, entry)) is None:
            whole = entry
            break
        problems.append(problem)
    taken = f"version {whole.version} is taken" if whole else "no whole version is left"
    for problem in problems:
        log.warning("%s; %s", problem, taken)
    return whole


def versions_told(params_dir: Path) -> dict[int, PublishedVersion]:
    """Every version that is told of and whose file is there, by number; its checksum is not compared."""
    return {n: entry for n, entry in _told(params_dir)[0].items() if (params_dir / entry.file).is_file()}


def problem_of(params_dir: Path, version: int) -> str | None:
    """What is wrong with a version, its checksum compared; None when it is whole."""
    entry = _told(params_dir)[0].get(version)
    return _problem(params_dir, entry) if entry else f"version {version} is not in {params_dir}"


def damages(params_dir: Path) -> list[str]:
    """What is wrong with the versions that are told of."""
    told, problems = _told(params_dir)
    return problems + [problem for entry in told.values() if (problem := _problem(params_dir, entry))]


def numbers_on_disk(params_dir: Path) -> list[int]:
    """Versions that a file name tells of, damaged ones included, ascending."""
    return sorted({int(found[1]) for path in params_dir.glob("v*") if (found := _NUMBER.fullmatch(path.name))})


def highest_number(params_dir: Path) -> int:
    """The highest version that a file name or `latest.json` tells of, damaged or not; 0 before the first.

    Numbers go on after it: an actor may have used it.
    """
    latest = PublishedVersion.read(params_dir)
    return max([0, latest.version if latest else 0, *numbers_on_disk(params_dir)])


def ever_told(params_dir: Path) -> bool:
    """Was any version told of, whole or not? A file alone is what a kill left of one that nobody has heard of."""
    return (params_dir / LATEST).exists() or any(params_dir.glob("v*.json"))


def check_file(path: Path) -> None:
    """DamagedFileError when a version's file is not what the folder tells of it; nothing where nothing is told."""
    entry = next((e for e in _told(path.parent)[0].values() if e.file == path.name), None)
    if entry is None and (number := _NUMBER.fullmatch(path.name)):
        entry = _read(_entry_path(path.parent, int(number[1])))  # says what is wrong with it
    if entry is not None and (problem := _problem(path.parent, entry)):
        raise DamagedFileError(problem)


def keep_newest(params_dir: Path, count: int) -> None:
    """Remove older versions, but for the best evaluated one and the one that an operator pinned.

    None while a damaged kept.json leaves the best unknown, or the gateway is about to pin one.
    """
    try:
        best = (read_sealed(params_dir / KEPT) or {}).get("version")
    except DamagedFileError:
        return
    try:
        with locked(params_dir):
            pinned = ActsLedger(params_dir.parent).state.served
            keep_only(params_dir, {best, pinned, *numbers_on_disk(params_dir)[-count:]})
    except BlockingIOError:
        log.warning("%s is held by another process: older versions go after the next one", params_dir)


def take_back(params_dir: Path, number: int) -> None:
    """Remove what a refused write left of a version. What `latest.json` names stays: it may be in use."""
    try:
        latest = _read(params_dir / LATEST)
    except DamagedFileError:
        latest = None
    if latest is None or latest.version != number:
        _remove(params_dir, number)


def keep_only(params_dir: Path, kept: Collection[int]) -> None:
    """Remove the versions that are not among these."""
    for number in set(numbers_on_disk(params_dir)) - set(kept):
        _remove(params_dir, number)


def file_path(params_dir: Path, version: int) -> Path:
    """Where the parameters of a version lie."""
    return params_dir / f"v{version:06d}.safetensors"


def _remove(params_dir: Path, number: int) -> None:
    # The entry first: without it the file is told of no longer.
    for path in (_entry_path(params_dir, number), file_path(params_dir, number)):
        clear(path)
        path.unlink(missing_ok=True)


def _entry_path(params_dir: Path, version: int) -> Path:
    return file_path(params_dir, version).with_suffix(".json")


def _told(params_dir: Path) -> tuple[dict[int, PublishedVersion], list[str]]:
    """Version -> what is told of it, by its own file or `latest.json`; and what could not be read."""
    told, problems = {}, []
    for path in (*params_dir.glob("v*.json"), params_dir / LATEST):
        try:
            if (entry := _read(path)) is not None:
                told.setdefault(entry.version, entry)
        except DamagedFileError as damage:
            problems.append(str(damage))
    return told, problems


def _read(path: Path) -> PublishedVersion | None:
    keys = [field.name for field in fields(PublishedVersion)]
    body = read_sealed(path, keys, keys)
    if body is None:
        return None
    try:
        check_name(f"{path}: file", body["file"])  # the folder may be a stranger's
    except ValueError as mistake:
        raise DamagedFileError(str(mistake)) from None
    if any(type(body[key]) is not int for key in ("version", "step", "bytes")):
        raise DamagedFileError(f"{path} is damaged: it is no entry of a version")
    return PublishedVersion(**body)


def _problem(params_dir: Path, entry: PublishedVersion) -> str | None:
    path = params_dir / entry.file
    try:
        if (size := path.stat().st_size) != entry.bytes:
            return f"{path} is damaged: expected {entry.bytes} bytes, found {size}"
        return None if sha256_of(path) == entry.sha256 else f"{path} is damaged: it does not match its sha256"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
