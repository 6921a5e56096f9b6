"""Small valid step batches whose values tell where they belong; used by the replay's and the gateway's tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from serl_launcher.replay.entries import DataEntry, Entry, SpecEntry, decode_entry
from serl_launcher.replay.journal import JournalReader
from serl_launcher.replay.journal_writer import JournalWriter
from serl_transport.contract.schema import EpisodeInfo, Outcome, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire import codec

SPEC = TaskSpec.from_dict(
    {
        "name": "toy",
        "prompt": "touch the wall",
        "cameras": {"front": [4, 5]},
        "state_names": ["x", "y"],
        "state_low": [-1, -1],
        "state_high": [1, 1],
        "action_names": ["dx", "dy"],
        "action_low": [-1, -1],
        "action_high": [1, 1],
        "control_hz": 10,
        "max_ticks": 60,
    }
)


def info(episode_id: str, *, actor: str = "a", boot: str = "b0", mode: str = "online", stage: str = "online", seed=1):
    """Who made the episode."""
    return EpisodeInfo(episode_id, actor, boot, SPEC.name, SPEC.prompt, mode, stage, seed, 1000.0)


def arrays(first: int, n: int, m: int, *, done=False, truncated=False, success=False, driven=(), version=3):
    """Ticks first .. first+n with m observations; state x is the tick / 100."""
    ticks, observed = np.arange(first, first + n), np.arange(first, first + m)
    last = ticks == first + n - 1
    return {
        "observation.images.front": np.broadcast_to(
            observed.astype(np.uint8)[:, None, None, None], (m, 4, 5, 3)
        ).copy(),
        "observation.state": np.stack([observed / 100, np.zeros(m)], 1).astype(np.float32),
        "action": np.stack([ticks / 100, np.zeros(n)], 1).astype(np.float32),
        "next.reward": np.where(last & success, 1, 0).astype(np.float32),
        "next.done": last & done,
        "next.truncated": last & truncated,
        "next.success": last & success,
        "intervention": np.isin(ticks, driven),
        "policy_version": np.full(n, version, np.int64),
        "time_ns": ticks.astype(np.int64),
    }


def batches(who: EpisodeInfo, sizes=(4, 3), *, success=True, driven=(), version=3) -> list[StepBatch]:
    """A whole episode cut into batches of the given sizes; a failure is a time limit."""
    result, first = [], 0
    for position, n in enumerate(sizes):
        final = position == len(sizes) - 1
        body = arrays(
            first, n, n + final, done=final and success, truncated=final and not success, success=final and success,
            driven=driven, version=version,
        )  # fmt: skip
        outcome = Outcome(success, "environment", None if success else "time_limit") if final else None
        result.append(StepBatch(who, first, body, final, outcome))
        result[-1].check(SPEC)
        first += n
    return result


def entry(batch: StepBatch, seq: int) -> DataEntry:
    """The batch as item `seq` of its actor."""
    who = batch.episode
    return DataEntry(who.actor_id, who.boot_id, seq, batch, codec.pack(batch.to_body()))


def entries(parts: list[StepBatch], first_seq: int = 1) -> list[DataEntry]:
    """The batches as an actor would number them."""
    return [entry(part, first_seq + i) for i, part in enumerate(parts)]


def wait_for(condition: Callable[[], object], seconds: float = 10.0):
    """Poll until the condition holds; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return value


def open_writer(folder: Path, segment_bytes: int = 1 << 20) -> JournalWriter:
    """A writer behind whatever the folder holds; callbacks run on its thread."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = JournalReader(folder)
    for _ in reader.poll():
        pass
    reader.close()
    return JournalWriter(folder, reader, lambda callback: callback(), segment_bytes)


def write_journal(run_dir: Path, items: list[Entry]) -> None:
    """A journal holding the spec and these entries."""
    writer = open_writer(run_dir / "journal")
    for item in [SpecEntry(SPEC), *items]:
        writer.append(item.payload(), lambda error, time_ns: None)
    writer.close()


def journal_items(run_dir: Path, spec: TaskSpec) -> Iterator[DataEntry]:
    """Every item the journal holds, in order, repeats included."""
    reader = JournalReader(run_dir / "journal")
    for record in reader.poll():
        entry = decode_entry(record.payload, spec)
        if isinstance(entry, DataEntry):
            yield entry
    reader.close()
