"""Episodes of a run's journal, in ordinal order: how the gateway, the exporter and whoever learns later read it."""

from collections.abc import Iterator
from pathlib import Path

from serl_launcher.replay.assembler import Assembler, ClosedEpisode
from serl_launcher.replay.entries import UnfitEntry, decode_entry
from serl_launcher.replay.journal import JournalReader
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.run.alive import beat
from serl_transport.contract.schema import Episode
from serl_transport.contract.specs import TaskSpec


class EpisodeStream:
    """Polls a (growing) journal for closed episodes.

    first_ordinal: earlier episodes are assembled but not yielded. follow: see JournalReader; use it while a gateway
    may be writing.
    """

    def __init__(self, run_dir: Path, spec: TaskSpec, first_ordinal: int = 0, follow: bool = False) -> None:
        self.reader = JournalReader(Path(run_dir) / "journal", follow=follow)  # where in the journal it stands
        self.assembler = Assembler(spec)  # what was seen and what is still open
        self._first = first_ordinal
        self._unfit: list[UnfitEntry] = []

    def poll(self) -> Iterator[ClosedEpisode]:
        """Every episode closed since the last poll. JournalCorrupt, SpecChangedError."""
        for record in self.reader.poll():
            beat()  # a long journal takes its time
            entry = decode_entry(record.payload, self.assembler.spec)
            if isinstance(entry, UnfitEntry):
                self._unfit.append(entry)
            for closed in self.assembler.apply(entry, record.time_ns):
                if closed.ordinal >= self._first:
                    yield closed

    def take_unfit(self) -> list[UnfitEntry]:
        """Records passed over since the last call: they would not be accepted today."""
        found, self._unfit = self._unfit, []
        return found

    def close(self) -> None:
        self.reader.close()


def journal_episodes(
    run_dir: Path, spec: TaskSpec, start: int = 0, relabelled: Relabelled | None = None
) -> Iterator[tuple[int, Episode]]:
    """(ordinal, episode) of everything the journal has closed, from ordinal `start` on, as people corrected it.

    relabelled: whose labels count; None: the run's own.
    """
    relabelled = relabelled or Relabelled(run_dir)
    stream = EpisodeStream(run_dir, spec, start)
    try:
        for closed in stream.poll():
            yield closed.ordinal, relabelled.correct(closed.build())
    finally:
        stream.close()
