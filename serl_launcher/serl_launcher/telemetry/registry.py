"""runs/index.jsonl: a row per run, for tables and other tools. Run folders are the truth, the index is made of them.

    run folder ─▶ row ─▶ refresh(runs/) ─▶ index.jsonl
                              └ rows of folders that are gone stay, marked `gone`

The learner's main and train_sft write their own row at a start and at an end, tools/runs.py all of them whenever it is
asked. A folder that cannot be read has a row that says why.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from serl_launcher.run.config import read_config
from serl_launcher.run.data_record import data_of
from serl_launcher.run.files import read_json, write_text
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import read_starts
from serl_launcher.telemetry.history import read_history
from serl_launcher.telemetry.summary import summarise

INDEX = "index.jsonl"
LOCK = ".index.lock"


def refresh(runs_dir: Path) -> list[dict[str, Any]]:
    """Look at every run folder in `runs_dir` and write the index anew; its rows, oldest start first.

    OSError when the index cannot be written.
    """
    with _alone(runs_dir):
        rows = [row(folder) for folder in folders(runs_dir)]
        gone = [old for old in read_index(runs_dir) if not any(_same(old, found, runs_dir) for found in rows)]
        rows += [{**old, "gone": True} for old in gone]
        return _write(runs_dir, rows)


def update(run_dir: Path) -> None:
    """Write one run's row anew; the whole index where there is none. OSError when it cannot be written."""
    runs_dir = run_dir.parent
    if not (runs_dir / INDEX).is_file():
        refresh(runs_dir)
        return
    with _alone(runs_dir):
        mine = row(run_dir)
        others = [old for old in read_index(runs_dir) if not _same(old, mine, runs_dir)]
        _write(runs_dir, [*others, mine])


def folders(runs_dir: Path) -> list[Path]:
    """Run folders in a folder: those with a config.yaml."""
    return sorted(path.parent for path in runs_dir.glob("*/config.yaml"))


def read_index(runs_dir: Path) -> list[dict[str, Any]]:
    """The rows as they lie there; a damaged line is passed over, the next refresh writes it anew."""
    path, rows = runs_dir / INDEX, []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                rows.append(found)
    return rows


def row(run_dir: Path) -> dict[str, Any]:
    """One run, from its folder alone."""
    paths = RunPaths(run_dir)
    starts = read_starts(paths)
    first, last = (starts[0], starts[-1]) if starts else (None, None)
    found: dict[str, Any] = {
        "run": run_dir.name,
        "run_id": first["run_id"] if first else None,
        "started": first["time"] if first else paths.config.stat().st_mtime,
        "last_start": last["time"] if last else None,
        "starts": len(starts),
        "kind": last["kind"] if last else None,
        "user": last["user"] if last else None,
        "commit": last["revision"]["commit"] if last else None,
        "code": last["revision"]["digest"] if last else None,
        "changed": len(last["revision"]["changed"]) if last else None,
        "config_sha256": hashlib.sha256(paths.config.read_bytes()).hexdigest(),
        "libraries": last["libraries"] if last else None,
        "dataset": (last.get("dataset") or {}).get("digest") if last else None,
        "wandb_id": _text(paths.metrics / "wandb_run_id"),
    }
    try:
        return found | _figures(paths, found["dataset"])
    except (ValueError, OSError) as error:
        return found | {"problem": str(error)}


def _figures(paths: RunPaths, dataset: str | None) -> dict[str, Any]:
    config = OmegaConf.to_container(read_config(paths.config))
    names = {key: ((config.get(key) or {}).get("name")) for key in ("task", "policy", "algo")}  # type: ignore[union-attr]
    summary = summarise(read_history(paths.root))
    best = read_json(paths.root / "best" / "best.json") or {}
    kept = ("success_rate", "success_rate_interval", "success_rate_episodes", "success_rate_from")
    return names | {
        "seed": config.get("seed"),  # type: ignore[union-attr]
        "complete": paths.summary.is_file(),
        **{key: summary[key] for key in kept},
        "held_out_loss": best.get("loss"),
        **{key: summary[key] for key in ("episodes", "transitions", "steps", "policy_versions", "minutes")},
        "dataset": dataset or data_of(paths)["digest"],
    }


def _same(one: Mapping[str, Any], other: Mapping[str, Any], runs_dir: Path) -> bool:
    """The same run, whatever its folder is called now; an older release's has its folder's name alone."""
    if one.get("run_id") and other.get("run_id"):
        here = (runs_dir / one["run"]).is_dir() and not one.get("gone")  # a copy beside the original has its own row
        return one["run_id"] == other["run_id"] and (one["run"] == other["run"] or not here)
    return one.get("run") == other.get("run")


def _write(runs_dir: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows.sort(key=lambda found: found.get("started") or 0.0)
    write_text(runs_dir / INDEX, "".join(json.dumps(found) + "\n" for found in rows))
    return rows


@contextlib.contextmanager
def _alone(runs_dir: Path) -> Iterator[None]:
    with (runs_dir / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None
