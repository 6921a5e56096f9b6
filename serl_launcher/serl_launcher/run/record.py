"""What a start leaves in the run's folder for whoever asks a week later: which code, config, libraries, who, where.

    supervisor.main, examples/train_sft.py ─▶ note_start ─▶ record/starts.jsonl, config-<digest>.yaml, code-<…>.patch
    learner.resume, tools/export_checkpoint.py ─▶ origin_of ─▶ origin.json beside the weights: the same, and the data

A checkpoint carries all of it, so that it answers from its own files wherever it was copied (run.provenance reads it).
Nothing that is written here holds a secret of the config. Torch-free.
"""

import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from serl_config.secrets import HIDDEN, literal_secrets, without_secrets
from serl_launcher.run.config import dotted
from serl_launcher.run.data_record import acts_of, data_of
from serl_launcher.run.files import append_whole, make_folder, seal, sync, unseal, write_text, write_whole
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.revision import ROOT, patch, revision

ORIGIN = "origin.json"  # beside a checkpoint's weights
MIN_SECRET = 8  # characters
EXPORTED_ORIGIN = "flowserl_origin.json"  # beside an export's, and in a dataset's meta/
LIBRARIES = (
    "torch", "lerobot", "transformers", "accelerate", "diffusers", "peft", "safetensors", "numpy", "datasets",
    "pyarrow", "av", "hydra-core", "omegaconf", "pyzmq", "wandb", "mujoco",
)  # fmt: skip


def note_start(
    paths: RunPaths, kind: str, words: Sequence[str], state: str, dataset: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write down that the run starts now, by the config.yaml that lies there; returns the line of starts.jsonl.

    kind: `learner` or `train_sft`; words: of the command line; state: new or resumed; dataset: what fine-tuning trains
    on. On disk when this returns. OSError when the disk refuses.
    """
    before = read_starts(paths)
    code, config = revision(), paths.config.read_bytes()
    digest, plain = hashlib.sha256(config).hexdigest(), yaml.safe_load(config)
    words_to_hide = [*_secrets(plain), *_secrets_of_the_environment()]
    changes = patch() if code.changed else None
    if changes is not None and any(word.encode() in changes for word in words_to_hide):
        changes = None  # a secret stands in a changed file
    line = {
        "run": paths.root.name,
        "run_id": before[0]["run_id"] if before else uuid.uuid4().hex[:8],
        "start": len(before) + 1,
        "time": time.time(),
        "kind": kind,
        "state": state,
        "words": hidden(words, words_to_hide),
        "user": user(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "revision": asdict(code),
        "patch": f"code-{code.digest[:12]}.patch" if changes is not None else None,
        "config_sha256": digest,
        "config": f"config-{digest[:12]}.yaml",
        "libraries": libraries(),
        "machine": machine(),
        **({"dataset": dict(dataset)} if dataset else {}),
    }
    make_folder(paths.record, durable=True)
    text = yaml.safe_dump(without_secrets(plain), sort_keys=False)
    write_text(paths.record / line["config"], text, durable=True)
    if changes is not None:
        write_whole(paths.record / line["patch"], lambda part: _private(part, changes), durable=True)
    _append(paths.starts, line)
    return line


def read_starts(paths: RunPaths) -> list[dict[str, Any]]:
    """The run's starts, oldest first; a line that a power cut tore is passed over."""
    rows = []
    for line in paths.starts.read_bytes().splitlines() if paths.starts.is_file() else ():
        try:
            row = unseal(json.loads(line))
            row["run_id"], row["time"]
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        rows.append(row)
    return rows


def origin_of(paths: RunPaths, step: int, version: int, made: float | None = None) -> dict[str, Any]:
    """What a file made by this run is made of. step: the trainer's; version: of the policy; made: unix s, default now.

    `start` is None, and the config what lies there, in a folder of an older release.
    """
    made = time.time() if made is None else made
    starts = read_starts(paths)
    start = next((row for row in reversed(starts) if row["time"] <= made), starts[0] if starts else None)
    return {
        "run": start["run"] if start else paths.root.name,
        "run_id": start["run_id"] if start else None,
        "step": step,
        "version": version,
        "time": made,
        "start": start,
        "starts": [_short(row) for row in starts],
        "config": (config := config_of(paths, start)),
        "data": data_of(paths, made),
        "acts": acts_of(paths, config, made),
    }


def short_origin(run_dir: Path) -> str:
    """For the header of a published version: run, its id, and digests of config and code, as JSON of one line."""
    starts = read_starts(RunPaths(run_dir))
    return json.dumps(_short(starts[-1]) if starts else {"run": run_dir.name})


def libraries() -> dict[str, str]:
    """Version of each library that decides about results, and the digest of the lock file they came from."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    lock = ROOT / "requirements" / "learner.txt"
    if lock.is_file():
        found["lock"] = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    return found


def machine() -> dict[str, Any]:
    """System, cores, and each NVIDIA GPU with the driver, as the kernel tells them; no torch is asked."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line.partition(":")[2].strip() for card in cards for line in _lines(card) if line.startswith("Model")]
    driver = _lines(Path("/proc/driver/nvidia/version"))
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": names,
        "driver": driver[0].partition(":")[2].strip() if driver else None,
    }


def hidden(words: Sequence[str], secrets: Sequence[str] = ()) -> list[str]:
    """The words of a command line, with the secrets among them hidden. secrets: those of the config."""
    shown = []
    for word in words:
        key, equals, value = word.partition("=")
        last = key.rpartition(".")[2].lstrip("+")
        text = f"{key}={without_secrets({last: value})[last]}" if equals else word
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        shown.append(text)
    return shown


def _secrets(config: Mapping[str, Any]) -> list[str]:
    """Secrets that stand in a config themselves."""
    keys = tuple(literal_secrets(config))
    named = {key: value for key, value in dotted(config).items() if f"{key}.".startswith(tuple(f"{k}." for k in keys))}
    return [value for value in named.values() if isinstance(value, str) and value]


def _secrets_of_the_environment() -> list[str]:
    """Values of variables such as WANDB_API_KEY and HF_TOKEN; short ones are no secrets."""
    names = without_secrets({name: value for name, value in os.environ.items() if len(value) >= MIN_SECRET})
    return [os.environ[name] for name, shown in names.items() if shown == HIDDEN]


def _private(path: Path, content: bytes) -> None:
    """Changed files may hold what is nobody else's business."""
    path.touch(0o600)
    path.write_bytes(content)


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    code = row.get("revision") or {}
    kept = {key: row.get(key) for key in ("run", "run_id", "start", "time", "user", "host", "config_sha256")}
    return kept | {"commit": code.get("commit"), "code": code.get("digest"), "changed": len(code.get("changed") or {})}


def config_of(paths: RunPaths, start: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The config of a start, secrets hidden; what lies in the folder where that is not kept; None where nothing is."""
    places = [*([paths.record / str(start["config"])] if start else []), paths.config]
    for path in places:
        if path.is_file():
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            return without_secrets(found) if isinstance(found, dict) else None
    return None


def _append(path: Path, row: Mapping[str, Any]) -> None:
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # of a power cut
        append_whole(descriptor, (b"\n" if torn else b"") + json.dumps(seal(row)).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        sync(path.parent)


def user() -> str:
    """Who runs this process: the login."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return f"uid {os.getuid()}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
