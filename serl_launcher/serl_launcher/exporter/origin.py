"""Is this dataset the journal's, and does the journal still hold all of it? The exporter asks before it goes on.

    journal's episodes, in order ─▶ Origin.look ─▶ at the dataset's newest one, or at the journal's end: a verdict

A dataset none of whose episodes the journal has in its place is another run's. One that shares episodes with the
journal and holds more than it does shows that the journal has lost them.
"""

import contextlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from serl_launcher.replay.assembler import ClosedEpisode
from serl_launcher.replay.journal import JournalCorrupt, how_to_recover


class Origin:
    """Compares the journal of a run with a dataset that lies in it."""

    def __init__(self, dataset: Path, run_dir: Path) -> None:
        self.dataset, self._run_dir = dataset, run_dir
        self._ids = episode_ids(dataset)  # by ordinal; none: there is no dataset
        self._last = max(self._ids, default=-1)
        self._same = self._other = 0  # episodes of the journal that the dataset has in their place, or others there
        self.settled = not self._ids
        self.foreign = False  # once settled: it is another run's

    def look(self, closed: ClosedEpisode) -> None:
        """The journal's next episode. JournalCorrupt when it has lost what the dataset holds."""
        theirs, ours = self._ids.get(closed.ordinal), closed.info.episode_id
        if theirs is not None:
            self._same += theirs == ours
            self._other += theirs != ours
        if closed.ordinal < self._last:
            return
        self.settled = True
        if theirs == ours:
            return
        if self._same:
            raise self._shorter(f"the journal has episode {ours} where {self.dataset} has {theirs}")
        self.foreign = True

    def ended(self) -> None:
        """The journal holds no further episode, and the dataset does. JournalCorrupt, unless the dataset is foreign."""
        self.settled = True
        if self._other and not self._same:
            self.foreign = True
            return
        raise self._shorter(f"the journal ends before the newest episode of {self.dataset}, {self._ids[self._last]}")

    def _shorter(self, what: str) -> JournalCorrupt:
        lost = len(self._ids) - self._same
        hint = "" if self._same else ". If that dataset is another run's, move it out of the folder; if not"
        return JournalCorrupt(
            f"{what}: {lost} of its {len(self._ids)} episodes are not in {self._run_dir / 'journal'}{hint}. "
            f"{how_to_recover(self._run_dir)}"
        )


def episode_ids(dataset: Path) -> dict[int, str]:
    """Ordinal -> episode id, of every episode of a dataset; a file that cannot be read says nothing."""
    ids: dict[int, str] = {}
    for path in sorted(dataset.glob("meta/episodes/*/*.parquet")):
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):
            table = pq.read_table(path, columns=["episode_ordinal", "episode_id"], page_checksum_verification=True)
            ids |= dict(zip(table["episode_ordinal"].to_pylist(), table["episode_id"].to_pylist(), strict=True))
    return ids
