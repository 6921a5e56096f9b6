"""`python -m serl_launcher.importer <run_dir>`: what `demos` names, into the run's journal; the learner's main waits.

    all sources: opened, compared with the task, their first and last pictures decoded ─▶ nothing wrong? ─▶ journal

Nothing is written where anything is refused. Exit codes: 0 everything is there, 2 a mistake of the user (in one line).
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serl_launcher.datasets.source import Source, read_sources
from serl_launcher.importer.demonstrations import Demonstrations, open_source
from serl_launcher.importer.journal import JournalImport
from serl_launcher.replay.journal import JournalCorrupt
from serl_launcher.replay.journal_writer import RunFolderBusyError
from serl_launcher.run.config import plain, read_config, task_spec
from serl_launcher.run.files import write_sealed
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.schedule import read_stages
from serl_transport.contract.bounds import printable
from serl_transport.contract.errors import StorageFull, WireError

MISTAKES = (ValueError, OSError, JournalCorrupt, RunFolderBusyError, StorageFull, WireError)
TELL_S = 2.0  # between two lines of progress
STAGE = "demos"  # of imported episodes where the schedule has no stage of demonstrations


def say(text: str) -> None:
    print(f"demos: {printable(text)}", flush=True)


def run(paths: RunPaths) -> None:
    """Import everything that is not there yet. Raises MISTAKES in the user's words."""
    config = read_config(paths.config, "task.spec", "demos")
    spec, stages = task_spec(config), read_stages(plain(config, "schedule.stages") or [])
    sources = read_sources(plain(config, "demos"))
    for source in sources:
        if Path(source.source).expanduser().resolve() == paths.root.resolve():
            raise ValueError(f"demos: {source.source} is this run itself")
    opened = [open_source(source, spec) for source in sources]
    stage = next((stage.name for stage in stages if stage.mode == "demo"), STAGE)
    journal = JournalImport(paths, spec, stage, int(plain(config, "journal.segment_mb")) << 20)
    try:
        plans = [(s, o, wanted(o, journal.done)) for s, o in zip(sources, opened, strict=True)]
        for source, found, digests in plans:
            announce(source, found, digests)
        for _, found, digests in plans:
            found.check(digests)
        _say_if_too_many(opened, int(plain(config, "replay.capacity_frames")))
        for source, found, digests in plans:
            bring_in(source, found, digests - {id_[len("import-") :] for id_ in journal.done}, journal)
    finally:
        journal.close()
    write_sealed(paths.demos, {"stage": stage, "sources": [provenance(s, o) for s, o, _ in plans]}, indent=1)


def wanted(found: Demonstrations, done: set[str]) -> set[str]:
    """By digest, what the journal lacks."""
    return {one.digest for one in found.found if one.episode_id not in done}


def announce(source: Source, found: Demonstrations, digests: set[str]) -> None:
    """One line a source, and what is worth knowing of it."""
    here = len(found.found) - len(digests)
    ticks = sum(one.n for one in found.found if one.digest in digests)
    left_out = "".join(f"; left out: {n} {why}" for why, n in sorted(found.left_out.items()))
    told = f"{len(digests)} episodes to import, {ticks} ticks" if digests else "nothing to import"
    say(f"{source.source}: {told}{f', {here} are here already' if here else ''}{left_out}")
    for note in found.notes:
        say(f"{source.source}: note: {note}")


def bring_in(source: Source, found: Demonstrations, digests: set[str], journal: JournalImport) -> None:
    """Episode by episode, saying how far it is."""
    started, told, episodes, ticks = time.monotonic(), time.monotonic(), 0, 0
    for one, items in found.batches(digests):
        journal.add(actor_name(source), one, items, say)
        journal.done.add(one.episode_id)
        episodes, ticks = episodes + 1, ticks + one.n
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            say(f"{source.source}: {episodes} of {len(digests)} episodes, {ticks} ticks")
    if digests:
        say(f"{source.source}: imported {episodes} episodes, {ticks} ticks, in {time.monotonic() - started:.1f} s")


def actor_name(source: Source) -> str:
    """What the journal calls who made the episodes: `demos-` and the source's last name."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(source.source).name)
    return f"demos-{name}"[:100]


def provenance(source: Source, found: Demonstrations) -> dict[str, Any]:
    """Which episode of which source became which of the run."""
    episodes = {one.episode_id: one.number for one in found.found}
    return {"source": source.source, "cameras": dict(source.cameras), "episodes": episodes}


def _say_if_too_many(opened: Sequence[Demonstrations], capacity: int) -> None:
    frames = sum(one.n + 1 for found in opened for one in found.found)
    if frames > capacity // 2:
        say(
            f"warning: {frames} frames of demonstrations, and replay.capacity_frames={capacity} keeps demonstrations "
            f"in half of it: the oldest leave the replay; {2 * frames} keeps them all"
        )


def main(argv: list[str]) -> int:
    """The exit code."""
    if len(argv) != 1:
        print("usage: python -m serl_launcher.importer <run_dir>", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run(RunPaths(Path(argv[0])))
    except MISTAKES as mistake:
        print(f"demos: {printable(str(mistake))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
