"""The exporter's loop: journal in, dataset out, exactly once whatever is killed when.

    journal ─▶ EpisodeStream.poll ─▶ DatasetWriter.add … commit ─▶ dataset/            (dataset_status.json beside it)

The dataset itself says which ordinal comes next. One that does not exist yet, or that cannot be continued (another
task's features, a foreign journal), is built in `dataset.staging/` and takes its place by rename once it has caught up.
One that holds more than the journal says that the journal is damaged: nothing is exported then (`origin.py`).
"""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serl_launcher.exporter.origin import Origin
from serl_launcher.exporter.recovery import UnusableDataset
from serl_launcher.exporter.writer import DatasetWriter
from serl_launcher.replay.assembler import ClosedEpisode
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.run.files import write_json
from serl_transport.contract.specs import TaskSpec

_log = logging.getLogger(__name__)
MAX_PENDING_BYTES = 256 << 20  # a batch is committed early when its compressed rows hold this much memory
POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class ExporterOptions:
    """`exporter:` of the config."""

    batch_episodes: int = 50  # episodes per commit
    period_s: float = 60.0  # a smaller batch is committed after this long
    video: str | bool = "auto"  # auto | true | false


class Exporter:
    """Follows one run's journal; owns its dataset folder."""

    def __init__(self, run_dir: Path, spec: TaskSpec, options: ExporterOptions, video: bool) -> None:
        self._run_dir = run_dir
        self._spec = spec
        self._options = options
        self._video = video
        self.dataset = run_dir / "dataset"
        self._staging = run_dir / "dataset.staging"
        self._discarded = run_dir / "dataset.replaced"
        self._replaced = self._discarded  # where the dataset goes when the staged one takes its place
        shutil.rmtree(self._discarded, ignore_errors=True)  # a kill may have left it
        self._writer = self._open()
        roots = dict.fromkeys([self.dataset, self._writer.root])
        origins = [Origin(root, run_dir) for root in roots]
        self._unsettled = [origin for origin in origins if not origin.settled]  # are they this journal's?
        # What a dataset holds was synced, whatever the mark says: after a power cut it is older than the dataset.
        self._stream = EpisodeStream(run_dir, spec, follow=not self._unsettled)
        self._pending_since: float | None = None

    def run(self, stopping: Callable[[float], bool]) -> None:
        """Export until `stopping(seconds to wait)` says so, then once more, so that everything journalled is in.

        Raises JournalCorrupt, SpecChangedError, OSError (disk full) with a message for the user.
        """
        stop = False
        while not stop:
            stop = stopping(POLL_S)
            self.poll(flush=stop)

    def poll(self, flush: bool = False) -> None:
        """Take what the journal closed since the last poll; commit a full or old batch, or any with `flush`."""
        options = self._options
        for closed in self._stream.poll():
            if self._unsettled and self._foreign(closed):
                return self.poll(flush)
            if closed.ordinal <= self._writer.state.last_ordinal:
                continue
            if self._writer.add(closed.ordinal, closed.build()) and self._pending_since is None:
                self._pending_since = time.monotonic()
            if self._writer.pending >= options.batch_episodes or self._writer.pending_bytes > MAX_PENDING_BYTES:
                self._commit()
        if self._unsettled and self._foreign(None):
            return self.poll(flush)
        old = self._pending_since is not None and time.monotonic() - self._pending_since >= options.period_s
        # the first episode is shown at once: a reader then finds a dataset, and an unfit task is noticed early
        if flush or old or (self._writer.pending and self._writer.root == self._staging):
            self._commit()
        if self._writer.root == self._staging and self._writer.state.episodes:
            self._promote()

    def close(self) -> None:
        """Close the journal. Episodes that were not committed are taken again at the next start."""
        self._stream.close()

    def _open(self) -> DatasetWriter:
        """The dataset, if there is one that can be continued, else the staged one."""
        if self.dataset.exists():
            try:
                return DatasetWriter(self.dataset, self._spec, self._video)
            except UnusableDataset as error:
                _log.warning("%s; building it anew from the journal", error)
        try:
            return DatasetWriter(self._staging, self._spec, self._video)
        except UnusableDataset:
            return self._empty()

    def _foreign(self, closed: ClosedEpisode | None) -> bool:
        """Show the datasets the journal's next episode, or its end; True when the journal is taken from its start."""
        for origin in self._unsettled:
            origin.look(closed) if closed else origin.ended()
            if origin.foreign:
                self._start_anew(origin.dataset)
                return True
        self._unsettled = [origin for origin in self._unsettled if not origin.settled]
        self._stream.reader.follow = not self._unsettled
        return False

    def _empty(self) -> DatasetWriter:
        """An empty dataset in the staging folder."""
        shutil.rmtree(self._staging, ignore_errors=True)
        return DatasetWriter(self._staging, self._spec, self._video)

    def _start_anew(self, foreign: Path) -> None:
        """Take the journal from its start into an empty dataset; a foreign one that was in place will be kept."""
        if foreign == self.dataset:
            self._replaced = self._run_dir / f"dataset.foreign-{time.time_ns()}"
        kept = f"it will be kept as {self._replaced.name}" if foreign == self.dataset else "it is built anew"
        _log.warning("%s holds episodes of another journal: %s", foreign, kept)
        self._stream.close()
        self._stream = EpisodeStream(self._run_dir, self._spec, follow=True)
        self._writer, self._unsettled = self._empty(), []

    def _commit(self) -> None:
        self._writer.commit()
        self._pending_since = None
        state = self._writer.state
        status = {"episodes": state.episodes, "frames": state.frames, "last_ordinal": state.last_ordinal}
        write_json(self._run_dir / "dataset_status.json", status)

    def _promote(self) -> None:
        """Put the staged dataset in place of the old one, which is deleted unless it is a foreign one."""
        if self.dataset.exists():
            self.dataset.rename(self._replaced)
        self._staging.rename(self.dataset)
        self._writer.root = self.dataset
        shutil.rmtree(self._discarded, ignore_errors=True)
