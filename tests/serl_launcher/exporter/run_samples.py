"""A small run folder: config, journal of whole episodes, and what the tests expect to find exported."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import yaml

from serl_launcher.replay.entries import DataEntry, Entry, SpecEntry
from serl_launcher.replay.journal import JournalReader
from serl_launcher.replay.journal_writer import JournalWriter
from serl_transport.contract.schema import Episode, EpisodeInfo, Outcome, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire import codec

SPEC = TaskSpec.from_dict(
    {
        "name": "toy",
        "prompt": "touch the wall",
        "cameras": {"front": [16, 24], "wrist": [32, 32]},
        "state_names": ["x", "y", "z"],
        "state_low": [-9, -9, -9],
        "state_high": [9, 9, 9],
        "action_names": ["dx", "dy"],
        "action_low": [-1, -1],
        "action_high": [1, 1],
        "control_hz": 10,
        "max_ticks": 60,
    }
)


def episode(index: int, n: int | None = None, mode: str = "online", prompt: str | None = None) -> Episode:
    """Episode `index`: random but reproducible; odd ones run into the time limit."""
    rng = np.random.default_rng(index)
    n = n or 3 + index % 5
    success = index % 2 == 0
    last = np.arange(n) == n - 1
    arrays = {
        f"observation.images.{camera}": rng.integers(0, 256, (n + 1, *size, 3), np.uint8)
        for camera, size in SPEC.cameras.items()
    }
    arrays |= {
        "observation.state": rng.normal(size=(n + 1, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "next.reward": np.where(last & success, 1, 0).astype(np.float32),
        "next.done": last & success,
        "next.truncated": last & (not success),
        "next.success": last & success,
        "intervention": np.arange(n) >= n - 1,
        "policy_version": np.full(n, index // 4, np.int64),
        "time_ns": (index * 10**9 + np.arange(n) * 10**8).astype(np.int64),
    }
    who = EpisodeInfo(
        f"episode-{index}", "actor-0", "boot-0", SPEC.name, prompt or SPEC.prompt, mode, mode, index, 1e9 + index
    )
    return Episode(who, Outcome(success, "environment", None if success else "time_limit"), arrays)


def entries(episodes: Iterable[Episode], first_seq: int = 1) -> list[DataEntry]:
    """The episodes as an actor sends them: two batches each."""
    result: list[DataEntry] = []
    for item in episodes:
        middle, n = item.n // 2, item.n
        for start, stop in ((0, middle), (middle, n)):
            final = stop == n
            arrays = {
                key: rows[start : stop + (final and key.startswith("observation"))].copy()
                for key, rows in item.arrays.items()
            }
            batch = StepBatch(item.info, start, arrays, final, item.outcome if final else None, item.drivers)
            batch.check(SPEC)
            seq = first_seq + len(result)
            frames = codec.pack(batch.to_body())
            result.append(DataEntry(item.info.actor_id, item.info.boot_id, seq, batch, frames))
    return result


def write_journal(run_dir: Path, items: Iterable[Entry]) -> None:
    """Append entries to the run's journal (the spec first when it is new)."""
    folder = run_dir / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    reader = JournalReader(folder)
    fresh = not list(reader.poll())
    reader.close()
    writer = JournalWriter(folder, reader, lambda callback: callback(), 1 << 16)
    for entry in [*([SpecEntry(SPEC)] if fresh else []), *items]:
        writer.append(entry.payload(), lambda error, time_ns: None)
    writer.close()


def write_config(run_dir: Path, **exporter: object) -> None:
    """A config.yaml with what the exporter and the tools read."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {
        "run": run_dir.name, "seed": 3, "task": {"name": SPEC.name, "spec": SPEC.to_dict()}, "exporter": exporter,
        "schedule": {"stages": []},
    }  # fmt: skip
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def write_ledger(path: Path, items: Iterable[DataEntry]) -> None:
    """The acknowledgements an actor would have written for these entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for entry in items:
            file.write(json.dumps(ledger_line(entry)) + "\n")


def ledger_line(entry: DataEntry) -> dict[str, object]:
    """One acknowledged item as the client notes it."""
    return {
        "boot": entry.boot_id, "seq": entry.seq, "crc32": entry.crc32,
        "episode_id": entry.batch.episode.episode_id, "first_tick": entry.batch.first_tick, "n": entry.batch.n,
    }  # fmt: skip
