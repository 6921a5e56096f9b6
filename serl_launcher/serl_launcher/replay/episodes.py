"""Episodes of a run's journal, in ordinal order: the one way in which exporter, checker and recovery read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from serl_launcher.replay.assembler import Assembler, ClosedEpisode
from serl_launcher.replay.entries import DataEntry, decode_entry
from serl_launcher.replay.journal import JournalReader
from serl_launcher.replay.relabelled import Relabelled
from serl_transport.contract.schema import Episode
from serl_transport.contract.specs import TaskSpec


class EpisodeStream:
    """Polls a (growing) journal for closed episodes.

    first_ordinal: earlier episodes are assembled but not yielded. follow: see JournalReader; use it while a gateway
    may be writing.
    """

    def __init__(self, run_dir: Path, spec: TaskSpec, first_ordinal: int = 0, follow: bool = False) -> None:
        self._reader = JournalReader(Path(run_dir) / "journal", follow=follow)
        self._assembler = Assembler(spec)
        self._first = first_ordinal

    @property
    def assembler(self) -> Assembler:
        """What was seen and what is still open."""
        return self._assembler

    @property
    def reader(self) -> JournalReader:
        """Where in the journal the stream stands."""
        return self._reader

    def poll(self) -> Iterator[ClosedEpisode]:
        """Every episode closed since the last poll. JournalCorrupt, SpecChangedError."""
        for record in self._reader.poll():
            entry = decode_entry(record.payload, self._assembler.spec)
            for closed in self._assembler.apply(entry, record.time_ns):
                if closed.ordinal >= self._first:
                    yield closed

    def close(self) -> None:
        """Close the journal."""
        self._reader.close()


def journal_episodes(
    run_dir: Path, spec: TaskSpec, start: int | None = None, relabelled: Relabelled | None = None
) -> Iterator[tuple[int, Episode]]:
    """(ordinal, episode) of everything the journal has closed, from ordinal `start` on, as people corrected it.

    relabelled: whose labels count; None: the run's own.
    """
    relabelled = relabelled or Relabelled(run_dir)
    stream = EpisodeStream(run_dir, spec, start or 0)
    try:
        for closed in stream.poll():
            yield closed.ordinal, relabelled.correct(closed.build())
    finally:
        stream.close()


def journal_items(run_dir: Path, spec: TaskSpec) -> Iterator[DataEntry]:
    """Every item the journal holds, in order, repeats included: what a checker compares with the actors' ledgers."""
    reader = JournalReader(Path(run_dir) / "journal")
    try:
        for record in reader.poll():
            entry = decode_entry(record.payload, spec)
            if isinstance(entry, DataEntry):
                yield entry
    finally:
        reader.close()
