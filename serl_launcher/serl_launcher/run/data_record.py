"""What a run was trained on, in figures and digests: episodes, who recorded and judged them, where others came from.

Called by run.record for each checkpoint and export: derived files of the run's folder in, plain containers out. Files
that are not there, or damaged, are left out: the journal keeps the truth, and this is a description of it. Torch-free.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from serl_launcher.run.acts import ActsLedger, Row
from serl_launcher.run.files import read_json, sha256_of
from serl_launcher.run.in_force import NOBODYS, fold
from serl_launcher.run.live_settings import in_force
from serl_launcher.run.paths import RunPaths

WHOLE_FILE = 64 << 20  # bytes; of a larger file the digest takes its first and last MiB, and its size
_END = 1 << 20


def data_of(paths: RunPaths, until: float | None = None) -> dict[str, Any]:
    """Episodes that were finished by then (unix s; None: all), and what people said of them."""
    rows = [row for row in _lines(paths.episodes) if until is None or row.get("end_time", 0) <= until]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.get('episode_id')} {row.get('n_ticks')} {row.get('success')}\n".encode())
    found: dict[str, Any] = {
        "episodes": len(rows),
        "ticks": sum(row.get("n_ticks", 0) for row in rows),
        "by_mode": dict(Counter(str(row.get("mode")) for row in rows)),
        "by_actor": dict(Counter(str(row.get("actor")) for row in rows)),
        "helped": sum(bool(row.get("interventions")) for row in rows),
        "last_ordinal": max((row.get("ordinal", -1) for row in rows), default=-1),
        "digest": digest.hexdigest()[:16],
    }
    words = {name: row.get("by") for name, row in (read_json(paths.relabelled) or {}).items() if isinstance(row, dict)}
    words |= {name: word.by for name, word in fold(acts_until(paths, until)).words.items()}
    found["people"] = {
        "drove": _counts(name for row in rows for name in row.get("drivers") or ()),
        "judged": _counts(row["judge"] for row in rows if row.get("judge")),
        "judged_afterwards": _counts(words.values()),
    }
    if lossy := _counts(kind for row in rows for kind in row.get("lossy") or ()):
        found["lossy_pictures"] = lossy  # how they were packed -> episodes; the others are what the cameras gave
    if demos := (read_json(paths.demos) or {}).get("sources"):
        found["demos"] = demos
    return found


def acts_until(paths: RunPaths, until: float | None = None) -> list[Row]:
    """Acts of people that were kept by then (unix s; None: all)."""
    rows = ActsLedger(paths.root).rows
    return [row for row in rows if until is None or "time" not in row or _unix(row["time"]) <= until]


def acts_of(paths: RunPaths, config: Mapping[str, Any] | None, until: float | None = None) -> dict[str, Any]:
    """What people had done to the run by then, by person and kind, and what they had changed of this config."""
    rows = acts_until(paths, until)
    done: dict[str, Counter[str]] = {}
    for row in rows:
        if row["act"] not in NOBODYS and "by" in row:
            done.setdefault(row["by"], Counter())[row["act"]] += 1
    settings = in_force(config, fold(rows)).settings if config else {}
    return {
        "by": {name: dict(kinds) for name, kinds in done.items()},
        "settings": {key: asdict(setting) for key, setting in settings.items()},
    }


def _counts(names: Iterable[Any]) -> dict[str, int]:
    return dict(Counter(map(str, names)))


def _unix(text: str) -> float:
    """Of a ledger's time; 0 where it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return 0.0


def dataset_digest(folder: Path) -> str:
    """16 hex digits over the names, sizes and contents of a dataset's files (of those above 64 MiB, both ends)."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("meta", "data", "videos") for path in (folder / part).rglob("*")):
        if path.is_file() and not path.name.endswith(".part"):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} {_content(path)}\n".encode())
    return digest.hexdigest()[:16]


def _content(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE_FILE:
        return sha256_of(path)
    with path.open("rb") as file:
        head = file.read(_END)
        file.seek(size - _END)
        return hashlib.sha256(head + file.read(_END)).hexdigest()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
