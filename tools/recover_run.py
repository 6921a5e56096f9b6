#!/usr/bin/env python
"""Go on from a run whose journal is damaged: what is readable, as a new run beside it.

    .venv/bin/python tools/recover_run.py runs/night1      ─▶ runs/night1.recovered; go on with run=night1.recovered

The new run holds every readable record in order, the newest parameters and checkpoints, what people said of episodes,
an e-stop that is latched and what an actor on this host has not delivered yet. Dataset and lists are made anew from the
journal. The damaged folder stays as it is. Prints what was lost, and keeps it in recovered.txt. Exit 0, or 2 with one
line when it cannot. Torch-free.
"""

import needs_learner  # noqa: F401

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from check_run import find_ledgers, read_ledger
from omegaconf import DictConfig, OmegaConf

from serl_launcher.gateway.ledger import listed_rows
from serl_launcher.replay.entries import DataEntry, SpecChangedError, SpecEntry, decode_entry
from serl_launcher.replay.journal import JournalCorrupt, segment_numbers, segment_path
from serl_launcher.replay.salvage import Salvage, write_journal
from serl_launcher.run.config import plain, read_config, task_spec
from serl_launcher.run.files import sync, write_text
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.specs import TaskSpec

LINKED = ("params", "checkpoints")  # files in there are replaced, never changed
COPIED = (
    "ticket.secret", "acts.jsonl", "acts.mark", "relabelled.json", "operator.json", "stage_progress.json", "estop",
    "metrics", "spool", "record", "journal.md",
)  # fmt: skip
SEGMENT_MB = 256
SHOWN = 20  # episodes that are printed; recovered.txt names all


@dataclass(slots=True)
class Episodes:
    """Which ticks of which episodes were found."""

    found: dict[str, dict[int, int]] = field(default_factory=dict)  # episode id -> first tick -> number of ticks
    unknown: int = 0  # records of no known form

    def add(self, entry: DataEntry) -> None:
        batch = entry.batch
        self.found.setdefault(batch.episode.episode_id, {})[batch.first_tick] = batch.n

    def holes(self, known: dict[str, int]) -> list[str]:
        """A line for each episode of which something is there and something is not. known: ticks that there were."""
        lines = []
        for episode_id, parts in self.found.items():
            ranges, n = _ranges(parts), sum(parts.values())
            if len(ranges) > 1 or (ranges and ranges[0][0] > 0) or n < known.get(episode_id, 0):
                there = ", ".join(f"{first}-{last}" for first, last in ranges)
                of = f", {n} of {known[episode_id]}" if episode_id in known else ""
                lines.append(f"{episode_id}: ticks {there} are there{of}")
        return lines


def _ranges(parts: dict[int, int]) -> list[tuple[int, int]]:
    """First and last tick of each stretch without a gap."""
    ranges: list[tuple[int, int]] = []
    for first, n in sorted(parts.items()):
        if n and ranges and ranges[-1][1] + 1 == first:
            ranges[-1] = (ranges[-1][0], first + n - 1)
        elif n:
            ranges.append((first, first + n - 1))
    return ranges


def main(argv: list[str] | None = None) -> int:
    """Recover a run folder; the exit status."""
    parser = argparse.ArgumentParser(description="Copy what is readable of a damaged run into a new one.")
    parser.add_argument("run_dir", type=Path)
    args = parser.parse_args(argv)
    try:
        report = recover(args.run_dir)
    except (OSError, ValueError) as error:
        print(f"recover_run: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def recover(run_dir: Path) -> str:
    """Make the new run; the report. ValueError or OSError when it cannot be made: nothing of it is left then."""
    paths = RunPaths(run_dir.resolve())
    if not segment_numbers(paths.journal):
        raise ValueError(
            f"{paths.journal} holds no segment: there is nothing to recover. A new run starts from this one's policy "
            f"with checkpoint_path={run_dir}"
        )
    with ExitStack() as locks:
        _lock_out(paths, locks)
        _check_room(paths)
        target = _free_name(paths.root)
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a recovery that was killed
        try:
            report = _fill(paths, part, target)
            part.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return report


def _lock_out(paths: RunPaths, locks: ExitStack) -> None:
    """Nobody may work in the folder meanwhile: learner, gateway, an actor on its spool."""
    for path in (paths.root / ".lock", paths.journal / "lock", *paths.root.glob("spool/*/lock")):
        if path.exists():
            file = locks.enter_context(path.open("rb"))
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is held by a process that works in {paths.root}: stop it first") from None


def _check_room(paths: RunPaths) -> None:
    journal = sum(segment_path(paths.journal, n).stat().st_size for n in segment_numbers(paths.journal))
    copied = sum(f.stat().st_size for name in COPIED for f in (paths.root / name).rglob("*") if f.is_file())
    free = shutil.disk_usage(paths.root.parent).free
    if free < (needed := journal + copied):
        raise ValueError(f"{needed >> 20} MB are needed beside {paths.root}, {free >> 20} MB are free: make room first")


def _free_name(root: Path) -> Path:
    name = target = root.with_name(f"{root.name}.recovered")
    k = 2
    while target.exists():
        target, k = name.with_name(f"{name.name}-{k}"), k + 1
    return target


def _fill(paths: RunPaths, part: Path, target: Path) -> str:
    """Everything of the new run, in `part`; the report."""
    config = _config(paths)
    salvage, episodes = Salvage(paths.journal), Episodes()
    spec = _spec(paths) if config is None else task_spec(config)
    segment_mb = plain(config, "journal.segment_mb", SEGMENT_MB) if config is not None else SEGMENT_MB
    kept = write_journal(part / "journal", _payloads(salvage, spec, episodes), segment_mb << 20)
    if config is not None:
        config.run = target.name
        write_text(part / "config.yaml", OmegaConf.to_yaml(config))
    for name in LINKED:
        if (paths.root / name).is_dir():
            shutil.copytree(paths.root / name, part / name, copy_function=_link)
    for name in COPIED:
        _copy(paths.root / name, part / name)
    known, notes = _known_ticks(paths)
    if config is None:
        notes.append("config.yaml could not be read: start with the words of the damaged run")
    lost = [f"{episode_id}: {n} ticks" for episode_id, n in known.items() if n and episode_id not in episodes.found]
    kinds = {"episodes with holes": episodes.holes(known), "episodes lost": lost}
    places = _places(paths, salvage, episodes)
    end = [*notes, f"{kept} records of {len(episodes.found)} episodes are in {target}", _advice(paths, target)]
    write_text(part / "recovered.txt", "\n".join([*places, *_listed(kinds, None), *end, ""]), durable=True)
    return "\n".join([*places, *_listed(kinds, SHOWN), *end])


def _config(paths: RunPaths) -> DictConfig | None:
    try:
        return read_config(paths.config, "task.spec")
    except (ValueError, OSError):
        return None  # the next start writes it; said in the report


def _spec(paths: RunPaths) -> TaskSpec:
    """The task as the journal's first record tells it, for a folder whose config.yaml is gone."""
    from msgpack import unpackb

    from serl_transport.wire import blob

    for record in Salvage(paths.journal).records():
        head = unpackb(blob.split(record.payload)[0])
        if head.get("kind") == "spec":
            return TaskSpec.from_dict(head["spec"])
    raise ValueError(f"neither {paths.config} nor the journal tells the task's spec: put a config.yaml there")


def _payloads(salvage: Salvage, spec: TaskSpec, episodes: Episodes) -> Iterator[tuple[bytes, int]]:
    """The readable records, led by the task's spec."""
    first = True
    for record in salvage.records():
        try:
            entry = decode_entry(record.payload, spec)
        except SpecChangedError:
            raise
        except (JournalCorrupt, ValueError):
            episodes.unknown += 1
            continue
        if first and not isinstance(entry, SpecEntry):
            yield SpecEntry(spec).payload(), record.time_ns
        first = False
        if isinstance(entry, DataEntry):
            episodes.add(entry)
        yield record.payload, record.time_ns
    if first:
        raise ValueError("no record of the journal is readable: nothing can be recovered")


def _link(source: str, destination: str) -> None:
    """The same file under a second name, or a copy where the file system has no such thing."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _copy(source: Path, destination: Path) -> None:
    if source.is_dir():  # an actor's list of acknowledgements belongs to the journal that acknowledged
        shutil.copytree(source, destination, ignore=shutil.ignore_patterns("*acknowledged*.jsonl", "ledger*.jsonl"))
    elif source.exists():
        shutil.copy2(source, destination)


def _known_ticks(paths: RunPaths) -> tuple[dict[str, int], list[str]]:
    """Episode id -> ticks that were acknowledged, as far as episodes.jsonl and the actors' lists tell; and notes."""
    listed: dict[str, int] = {}
    for row in listed_rows(paths.episodes):
        episode_id = row["episode_id"].partition("~")[0]
        listed[episode_id] = listed.get(episode_id, 0) + row["n_ticks"]
    items: dict[tuple[str, int], tuple[str, int]] = {}
    notes = []
    for path in find_ledgers(paths.root):
        try:
            items |= {key: (row["episode_id"], row["n"] or 0) for key, row in read_ledger(path)}
        except (ValueError, KeyError) as error:
            notes.append(f"not compared with {path}, which cannot be read: {error}")
    acknowledged: dict[str, int] = {}
    for episode_id, n in items.values():
        acknowledged[episode_id] = acknowledged.get(episode_id, 0) + n
    return {name: max(listed.get(name, 0), acknowledged.get(name, 0)) for name in listed | acknowledged}, notes


def _places(paths: RunPaths, salvage: Salvage, episodes: Episodes) -> list[str]:
    """Where the journal is damaged, a line each."""
    count = len(salvage.holes)
    lines = [
        f"{paths.journal}: {count or 'no'} {'place' if count == 1 else 'places'} where acknowledged data is missing"
    ]
    lines += [f"  {hole}" for hole in salvage.holes]
    if salvage.mark is None:
        lines.append("  journal/durable is missing or damaged: whether more is missing at the end cannot be told")
    if salvage.torn_bytes:
        lines.append(f"  {salvage.torn_bytes} bytes at the end were never acknowledged and are left out")
    if episodes.unknown:
        lines.append(f"  {episodes.unknown} records have no form that this version knows and are left out")
    return lines


def _listed(kinds: dict[str, list[str]], shown: int | None) -> list[str]:
    """Each kind of episodes with its number, and at most so many of them by id."""
    lines = []
    for kind, rows in kinds.items():
        lines += [f"{kind}: {len(rows)}", *(f"  {row}" for row in rows[:shown])]
        lines += [f"  and {len(rows) - shown} more, in recovered.txt"] if shown and len(rows) > shown else []
    return lines


def _advice(paths: RunPaths, target: Path) -> str:
    return (
        f"Go on with run={target.name} on both sides. An actor on another host: before its start, move its "
        f"{paths.root.name}/spool to {target.name}/spool; it holds what was not delivered yet"
    )


if __name__ == "__main__":
    sys.exit(main())
