"""Which code, config, data, people and policy version made this file: asked of the file itself, wherever it lies.

    a run's folder, a checkpoint, a published version, an export, one of edit_dataset's ─▶ find ─▶ Found

Called by tools/runs.py. Weights carry their record (run.record), so the run's folder may be gone. Torch-free.
"""

import json
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serl_launcher.run import checkpoints
from serl_launcher.run.files import read_sealed
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import EXPORTED_ORIGIN, ORIGIN, origin_of
from serl_launcher.run.versions import PublishedVersion, check_file
from serl_transport.contract.bounds import printable

MAX_HEADER = 32 << 20  # bytes of a safetensors file's header


@dataclass(frozen=True, slots=True)
class Found:
    """The record of one thing."""

    what: str  # for people: `checkpoint of step 900`
    place: Path
    origin: Mapping[str, Any]  # as run.record.origin_of made it; of a published version the short form
    whole: str | None  # what was compared with its checksums; None: nothing has any


def find(path: Path) -> Found:
    """The record of what lies there. ValueError in one line: nothing there, damaged, or without a record."""
    if path.is_file():
        return _published(path)
    if (path / "config.yaml").is_file():
        return _run(path)
    if (path / checkpoints.MANIFEST).is_file():
        return _checkpoint(path)
    for place, what in ((path / EXPORTED_ORIGIN, "export"), (path / "meta" / EXPORTED_ORIGIN, "dataset")):
        if (origin := read_sealed(place)) is not None:
            return Found(what, path, origin, None)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    raise ValueError(
        f"{path}: expected a run's folder, one of its checkpoints, a params/*.safetensors file, a folder that "
        f"tools/export_checkpoint.py wrote or a dataset that tools/edit_dataset.py wrote; it holds no record of how it "
        "was made (an older release wrote none)"
    )


def _run(path: Path) -> Found:
    newest = PublishedVersion.read(path / "params")
    step, version = (newest.step, newest.version) if newest else (0, 0)
    return Found("run", path, origin_of(RunPaths(path), step, version) | {"time": None}, None)


def _checkpoint(path: Path) -> Found:
    if problem := checkpoints.problem(path):
        raise ValueError(problem)
    origin = read_sealed(path / ORIGIN)
    step = read_sealed(path / checkpoints.MANIFEST) or {}
    what = f"checkpoint of step {step.get('step')}"
    if origin is None:
        run = path.absolute().parents[1]
        if not (run / "config.yaml").is_file():
            raise ValueError(f"{path}: an older release wrote it, without {ORIGIN}, and its run's folder is not there")
        state = checkpoints.read_state(path)
        made = (path / checkpoints.MANIFEST).stat().st_mtime
        origin = origin_of(RunPaths(run), step.get("step", 0), state.get("version", 0), made)
    return Found(what, path, origin, "every file matches its sha256")


def _published(path: Path) -> Found:
    metadata = header_of(path)
    if "version" not in metadata:
        raise ValueError(f"{path}: expected a published version (params/v*.safetensors); its header names no version")
    entry = path.with_suffix(".json")
    if entry.is_file():
        check_file(path)
    try:
        short = json.loads(metadata.get("origin", "{}"))
    except ValueError:
        raise ValueError(f"{path}: the record in its header cannot be read") from None
    step, version = int(metadata.get("step", -1)), int(metadata["version"])
    run = next((parent for parent in path.absolute().parents[1:2] if (parent / "config.yaml").is_file()), None)
    if run is not None:
        made = (read_sealed(entry) or {}).get("time", path.stat().st_mtime) if entry.is_file() else None
        origin: Mapping[str, Any] = origin_of(RunPaths(run), step, version, made)
    else:
        origin = {**short, "step": step, "version": version, "start": None, "short": short}
    compared = f"matches the sha256 in {entry.name}" if entry.is_file() else None
    return Found(f"version {version}", path, origin, compared)


def header_of(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header. ValueError where it is none."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if not 2 <= size <= MAX_HEADER:
                raise ValueError
            return dict(json.loads(file.read(size)).get("__metadata__") or {})
    except (OSError, ValueError, struct.error, AttributeError):
        raise ValueError(f"{path}: expected a safetensors file; its header cannot be read") from None


def describe(found: Found) -> list[str]:
    """The answer as lines `what  words`, nothing left out silently: what is not known says so."""
    origin = found.origin
    rows = [("what", f"{found.what}: {found.place}"), *_identity(origin)]
    start = origin.get("start")
    rows += list(_of_start(start)) if start else list(_of_nothing(origin))
    if "sources" not in origin:
        rows += list(_data(origin.get("data"))) if "data" in origin else [("data", "not recorded in this file")]
    rows += list(_acts(origin["acts"])) if "acts" in origin else []
    rows += list(_sources(origin))
    rows.append(("whole", found.whole or "not compared: no checksums lie beside it"))
    return [printable(f"{name:<14} {text}") for name, text in rows]


def _identity(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "run" in origin:
        yield "run", f"{origin['run']}, id {origin.get('run_id') or 'not recorded (an older release)'}"
    if origin.get("version") is not None:
        yield "policy", f"version {origin['version']}, trainer step {origin.get('step')}"
    if origin.get("time"):
        yield "made", when(origin["time"])


def _of_start(start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    code = start["revision"]
    yield "code", f"commit {code['commit'] or 'not known'}, digest {code['digest']}"
    if code.get("problem"):
        yield "", code["problem"]
    for name, content in (code.get("changed") or {}).items():
        yield "  changed", f"{name} {content[:12]}"
    if code.get("changed"):
        kept = start.get("patch")
        yield (
            "",
            f"the changes: record/{kept} of the run's folder"
            if kept
            else "the changes were not kept (too large, or a secret stands in them)",
        )
    yield "config", f"sha256 {start['config_sha256']}, record/{start['config']} of the run's folder"
    yield "started", f"{when(start['time'])}, start {start['start']} of the run ({start['kind']}, {start['state']})"
    yield "by", f"{start['user']} on {start['host']}: {' '.join(start['words'])}"
    known = start.get("libraries") or {}
    yield "libraries", ", ".join(f"{name} {version}" for name, version in known.items())
    gpus = (start.get("machine") or {}).get("gpus") or []
    yield "machine", ", ".join([(start.get("machine") or {}).get("system", "?"), *gpus])
    if data := start.get("dataset"):
        yield "dataset", ", ".join(f"{key} {value}" for key, value in data.items())


def _of_nothing(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    short = origin.get("short")
    if short:
        changed = f" with {short['changed']} changed files" if short.get("changed") else ""
        yield "code", f"commit {short.get('commit')}{changed}, digest {short.get('code')}"
        if short.get("config_sha256"):
            yield "config", f"sha256 {short['config_sha256']}, start {short.get('start')} of the run"
        yield "by", " on ".join(str(short[key]) for key in ("user", "host") if short.get(key))
    elif "config" in origin:
        yield "code", "not recorded: an older release made it, or the record/ of its run is gone"


def _data(data: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if not data:
        yield "data", "none"
        return
    modes = ", ".join(f"{count} {mode}" for mode, count in data["by_mode"].items())
    yield "data", f"{data['episodes']} episodes ({modes or 'none'}), {data['ticks']} ticks, digest {data['digest']}"
    yield "", f"{data['helped']} with help; newest ordinal {data['last_ordinal']}"
    for actor, count in data["by_actor"].items():
        yield "recorded by", f"actor {actor}: {count} episodes"
    people = data.get("people") or {"judged_afterwards": data.get("relabelled_by") or {}}
    for what, said in _PEOPLE.items():
        for name, count in (people.get(what) or {}).items():
            yield "operators", f"{name} {said.format(count)}"
    if "people" in data and not people["drove"] and data["helped"]:
        yield "operators", "who drove is not recorded (an older release)"
    for kind, count in (data.get("lossy_pictures") or {}).items():
        yield "pictures", f"of {count} episodes packed as {kind}: not exactly what the cameras gave"
    for source in data.get("demos") or ():
        yield (
            "demos",
            ", ".join(f"{key} {value}" for key, value in source.items() if not isinstance(value, dict | list)),
        )


_PEOPLE = {
    "drove": "drove in {} episodes",
    "judged": "judged {} episodes at the robot",
    "judged_afterwards": "judged {} episodes afterwards",
}


def _acts(acts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What people did to the run until then (acts.jsonl)."""
    for name, kinds in acts["by"].items():
        yield "acts", f"{name}: {', '.join(f'{kind} {count}' for kind, count in kinds.items())}"
    for key, setting in acts["settings"].items():
        yield "  set", f"{key}={setting['value']} by {setting['by']} ({setting['time']}); config: {setting['was']}"


def _sources(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for source in origin.get("sources") or ():
        yield "from", ", ".join(f"{key} {value}" for key, value in source.items())
    for key in ("selection", "changes"):
        if origin.get(key):
            yield key, str(origin[key])


def when(unix: float) -> str:
    """`2026-11-30 18:54:12 +0000`, of unix seconds."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(unix))
