#!/usr/bin/env python
"""The durability oracle: was everything that the learner acknowledged kept, exactly once and unchanged?

    python tools/check_run.py runs/quickstart [--ledger FILE ...] [--live] [--images]

Three witnesses are compared: the actors' ledgers of acknowledgements (fsynced before the spool forgets an item), the
journal, and the LeRobot dataset. Prints a table; exits 1 on any loss, duplicate or difference, 2 when it cannot look.
`--live`: the run goes on, so newest episodes may not be exported yet. `--images`: decode and compare PNG images too.
"""

import needs_learner  # noqa: F401

import argparse
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serl_launcher.exporter.__main__ import read_run
from serl_launcher.exporter.columns import episode_columns
from serl_launcher.exporter.features import SCALARS, image_keys
from serl_launcher.exporter.quarantine import read_quarantine
from serl_launcher.replay.assembler import Assembler
from serl_launcher.replay.entries import DataEntry, UnfitEntry, decode_entry
from serl_launcher.replay.journal import JournalCorrupt, JournalReader
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.bounds import printable
from serl_transport.contract.schema import Episode
from serl_transport.contract.specs import TaskSpec

SHOWN = 10  # problems of one kind that are printed
DIGESTED = ["observation.state", "action", *SCALARS, "timestamp", "frame_index"]  # columns that are compared


@dataclass(slots=True)
class Report:
    """What was counted and what is wrong."""

    counts: dict[str, int] = field(default_factory=dict)  # line of the table -> number
    problems: dict[str, list[str]] = field(default_factory=dict)  # kind -> one line each

    def problem(self, kind: str, line: str) -> None:
        """Note something that must not be."""
        self.problems.setdefault(kind, []).append(printable(line))

    def text(self) -> str:
        """The table, the problems, the verdict."""
        width = max(len(name) for name in self.counts)
        lines = [f"  {name:<{width}}  {count:>9}" for name, count in self.counts.items()]
        for kind, found in self.problems.items():
            lines.append(f"  {kind}: {len(found)}")
            lines += [f"    {line}" for line in found[:SHOWN]]
            lines += [f"    ... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        lines.append("FAILED" if self.problems else "ok: nothing lost, nothing twice, nothing changed")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Item:
    """One journalled step batch, without its arrays."""

    actor: str
    episode_id: str
    first_tick: int
    n: int
    crc32: int  # of the frames as sent, as in the ledger
    versions: np.ndarray  # int64[≤ n], policy versions of the ticks that a policy drove


@dataclass(frozen=True, slots=True)
class Kept:
    """One closed episode as the journal gives it."""

    episode_id: str  # `<id>~<first tick>` for a late part
    n: int
    digest: int  # crc32 of its numeric rows (and images, when asked for)


def main(argv: list[str] | None = None) -> int:
    """Check a run folder; the exit status."""
    parser = argparse.ArgumentParser(description="Compare acknowledgements, journal and dataset of a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--ledger", type=Path, nargs="*", help="default: every *acknowledged*/ledger*.jsonl in spool/")
    parser.add_argument("--live", action="store_true", help="the run goes on: the newest episodes may be missing")
    parser.add_argument("--images", action="store_true", help="compare PNG images too")
    args = parser.parse_args(argv)
    try:
        report = check(args.run_dir, args.ledger, args.live, args.images)
    except (JournalCorrupt, OSError, ValueError) as error:
        print(f"check_run: {error}", file=sys.stderr)
        return 2
    print(f"{args.run_dir}\n{report.text()}")
    return 1 if report.problems else 0


def check(run_dir: Path, ledgers: list[Path] | None = None, live: bool = False, images: bool = False) -> Report:
    """Compare the three witnesses. ValueError or OSError when one cannot be read."""
    spec, _ = read_run(run_dir)
    report = Report()
    paths = find_ledgers(run_dir) if ledgers is None else ledgers
    acknowledged = dict(row for path in paths for row in read_ledger(path))
    items, kept = read_journal(run_dir, spec, images, report)
    report.counts["ledgers"] = len(paths)
    check_acknowledged(acknowledged, items, report)
    check_versions(items, report)
    check_dataset(run_dir, spec, kept, live, images, report)
    check_episode_ledger(run_dir, kept, live, report)
    return report


def find_ledgers(run_dir: Path) -> list[Path]:
    """The ledgers of actors that ran in this folder."""
    spool = run_dir / "spool"
    return sorted({*spool.rglob("*acknowledged*.jsonl"), *spool.rglob("ledger*.jsonl")})


def read_ledger(path: Path) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """(boot, seq) -> line. A kill may tear the last line, which then acknowledges nothing; lines may repeat."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        try:
            row = json.loads(line) if line else None
        except ValueError as error:
            if number < len(lines) - 1:
                raise ValueError(f"{path} line {number + 1}: {error}") from None
            row = None
        if row is not None:
            yield (row["boot"], row["seq"]), row


def read_journal(
    run_dir: Path, spec: TaskSpec, images: bool, report: Report
) -> tuple[dict[tuple[str, int], Item], dict[int, Kept]]:
    """Every journalled item and closed episode; notes duplicates and batches that fit nowhere."""
    folder = RunPaths(run_dir).journal
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: nothing was journalled")
    items: dict[tuple[str, int], Item] = {}
    kept: dict[int, Kept] = {}
    assembler, ticks, unfit = Assembler(spec), 0, 0
    reader = JournalReader(folder)
    for record in reader.poll():
        entry = decode_entry(record.payload, spec)
        if isinstance(entry, DataEntry):
            key = (entry.boot_id, entry.seq)
            if key in items:
                report.problem("journalled twice", f"boot {key[0]} seq {key[1]}")
            batch, versions = entry.batch, entry.batch.arrays["policy_version"]
            where = (entry.actor_id, batch.episode.episode_id, batch.first_tick, batch.n)
            items[key] = Item(*where, entry.crc32, versions[versions >= 0])
            ticks += batch.n
        elif isinstance(entry, UnfitEntry):
            unfit += 1
            items[entry.boot_id, entry.seq] = Item(entry.actor_id, "", 0, 0, entry.crc32, np.zeros(0, np.int64))
        for closed in assembler.apply(entry, record.time_ns):
            episode = closed.build()
            kept[closed.ordinal] = Kept(
                closed.info.episode_id, episode.n, digest(episode, spec, closed.ordinal, images)
            )
    reader.close()
    if assembler.dropped:
        report.problem("contradictory batches", f"{assembler.dropped} journalled batches fit into no episode")
    _check_ticks(ticks, kept, assembler, report)
    if unfit:
        report.counts["items in the journal that fit no more, left out"] = unfit
    report.counts |= {"items in the journal": len(items), "ticks in the journal": ticks, "episodes closed": len(kept)}
    return items, kept


def _check_ticks(ticks: int, kept: dict[int, Kept], assembler: Assembler, report: Report) -> None:
    """Each journalled tick is in one closed episode, in an open one, or waits as the last tick of a cut one."""
    closed = sum(episode.n for episode in kept.values())
    opened = sum(batch.n for episode in assembler.open.values() for batch in episode.batches.values())
    waiting = ticks - closed - opened
    report.counts |= {"ticks in closed episodes": closed, "ticks in open episodes": opened}
    report.counts["last ticks of cut episodes, without next observation"] = waiting
    if waiting < 0:
        report.problem("ticks twice", f"closed and open episodes hold {-waiting} ticks more than the journal")


def check_acknowledged(
    acknowledged: dict[tuple[str, int], dict[str, Any]], items: dict[tuple[str, int], Item], report: Report
) -> None:
    """Each acknowledged item is in the journal, with the same bytes."""
    report.counts["acknowledged items"] = len(acknowledged)
    report.counts["acknowledged ticks"] = sum(row["n"] or 0 for row in acknowledged.values())
    for (boot, seq), row in acknowledged.items():
        item = items.get((boot, seq))
        where = f"boot {boot} seq {seq}: episode {row['episode_id']} ticks {row['first_tick']}+{row['n']}"
        if item is None:
            report.problem("acknowledged but lost", where)
        elif item.crc32 != row["crc32"]:
            report.problem("acknowledged but changed", where)


def check_versions(items: dict[tuple[str, int], Item], report: Report) -> None:
    """In the order in which a process made its items, the policy version never falls."""
    newest: dict[str, int] = {}
    for boot, seq in sorted(items):
        item = items[boot, seq]
        versions = [newest.get(boot, -1), *item.versions.tolist()]
        if versions != sorted(versions):
            where = f"actor {item.actor} boot {boot} seq {seq}"
            report.problem("policy version fell", f"{where}: version {versions[-1]} after {max(versions)}")
        newest[boot] = versions[-1]


def check_dataset(
    run_dir: Path, spec: TaskSpec, kept: dict[int, Kept], live: bool, images: bool, report: Report
) -> None:
    """Each closed episode is in the dataset exactly once, with the same rows."""
    found: Counter[int] = Counter()
    for ordinal, n, crc in read_dataset(RunPaths(run_dir).dataset, spec, images):
        found[ordinal] += 1
        mine = kept.get(ordinal)
        if mine is None:
            report.problem("in the dataset only", f"ordinal {ordinal}")
        elif (mine.n, mine.digest) != (n, crc):
            report.problem(
                "differs in the dataset", f"ordinal {ordinal}, episode {mine.episode_id}: {n} of {mine.n} rows"
            )
    report.counts["episodes in the dataset"] = len(found)
    for ordinal, count in found.items():
        if count > 1:
            report.problem("twice in the dataset", f"ordinal {ordinal}: {count} times")
    aside = {(row["ordinal"], row["episode_id"]) for row in read_quarantine(run_dir) if row.get("ordinal") is not None}
    aside = {ordinal for ordinal, episode in kept.items() if (ordinal, episode.episode_id) in aside} - set(found)
    if aside:
        report.counts["episodes in quarantine"] = len(aside)
    wanted = [ordinal for ordinal, episode in kept.items() if episode.n and ordinal not in aside]
    missing = [ordinal for ordinal in wanted if ordinal not in found]
    pending = [ordinal for ordinal in missing if live and ordinal > max(found, default=-1)]
    for ordinal in missing[: len(missing) - len(pending)]:  # in ascending order, as the journal closed them
        report.problem("missing in the dataset", f"ordinal {ordinal}, episode {kept[ordinal].episode_id}")
    if live:
        report.counts["episodes not exported yet"] = len(pending)


def read_dataset(root: Path, spec: TaskSpec, images: bool) -> Iterator[tuple[int, int, int]]:
    """(ordinal, rows, digest) of each episode index in the data files; nothing when there is no dataset."""
    for path in sorted(root.glob("data/*/*.parquet")):
        schema = pq.read_schema(path)
        pictures = [key for key in image_keys(spec) if images and key in schema.names]
        table = pq.read_table(path, columns=["episode_index", *DIGESTED, *pictures])
        index = table["episode_index"].to_numpy()
        starts = [0, *(np.nonzero(np.diff(index))[0] + 1).tolist()] if len(index) else []
        for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
            rows = table.slice(start, stop - start)
            arrays = {key: _dense(rows[key]) for key in DIGESTED}
            crc = _crc(arrays[key] for key in DIGESTED)
            crc = _crc((_decode(cell["bytes"].as_buffer()) for key in pictures for cell in rows[key]), crc)
            yield int(arrays["complementary_info.episode_ordinal"][0]), stop - start, crc


def digest(episode: Episode, spec: TaskSpec, ordinal: int, images: bool) -> int:
    """The crc32 that `read_dataset` finds for the same rows."""
    columns = episode_columns(episode, spec, ordinal, episode_index=0, first_index=0, task_index=0)
    crc = _crc(columns[key] for key in DIGESTED)
    pictures = (image for key in image_keys(spec) for image in episode.arrays[key][: episode.n])
    return _crc(pictures, crc) if images else crc


def _crc(arrays: Iterable[np.ndarray], start: int = 0) -> int:
    for array in arrays:
        start = zlib.crc32(np.ascontiguousarray(array).tobytes(), start)
    return start


def _dense(column: pa.ChunkedArray) -> np.ndarray:
    """A parquet column as numpy [n] or [n, d]."""
    array = column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def _decode(png: Any) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(io.BytesIO(png)))


def check_episode_ledger(run_dir: Path, kept: dict[int, Kept], live: bool, report: Report) -> None:
    """episodes.jsonl, when there is one, names the same episodes."""
    path = RunPaths(run_dir).episodes
    if not path.exists():
        return
    rows = {row["ordinal"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    report.counts["episodes in episodes.jsonl"] = len(rows)
    for ordinal in sorted(set(rows) ^ set(kept)):
        if not (live and ordinal > max(rows, default=-1)):
            report.problem("episodes.jsonl and the journal disagree", f"ordinal {ordinal} is in one of them only")
    for ordinal in sorted(set(rows) & set(kept)):
        if (rows[ordinal]["episode_id"], rows[ordinal]["n_ticks"]) != (kept[ordinal].episode_id, kept[ordinal].n):
            report.problem("episodes.jsonl and the journal disagree", f"ordinal {ordinal}: {rows[ordinal]}")


if __name__ == "__main__":
    sys.exit(main())
