"""The exporter's loop: journal in, dataset out, exactly once whatever is killed when.

    journal ─▶ EpisodeStream.poll ─▶ DatasetWriter.add … commit ─▶ dataset/            (dataset_status.json beside it)
                                          └ cannot be done, or kills the process again and again ─▶ Quarantine

The dataset itself says which ordinal comes next. One that does not exist yet, or that cannot be continued (another
task's features, a foreign journal), is built in `dataset.staging/` and takes its place by rename once it has caught up.
One that holds more than the journal says that the journal is damaged: nothing is exported then (`origin.py`).
"""

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from serl_launcher.exporter.origin import Origin
from serl_launcher.exporter.quarantine import MAX_DEATHS, Attempt, Quarantine
from serl_launcher.exporter.recovery import UnusableDataset
from serl_launcher.exporter.writer import DatasetWriter
from serl_launcher.replay.assembler import ClosedEpisode
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.run.alive import Pace, beat, busy
from serl_launcher.run.files import FULL, REFUSED, write_json
from serl_transport.contract.specs import TaskSpec

_log = logging.getLogger(__name__)
MAX_PENDING_BYTES = 256 << 20  # a batch is committed early when its compressed rows hold this much memory
POLL_S = 1.0
REFUSALS = {*FULL, *REFUSED, *(getattr(errno, name) for name in (
    "EACCES", "EPERM", "EMFILE", "ENFILE", "ENOMEM", "ENOENT"
))}  # of a disk or a system, which no episode can help  # fmt: skip
OPEN_S = 3600.0  # may take so long


@dataclass(frozen=True, slots=True)
class ExporterOptions:
    """`exporter:` of the config."""

    batch_episodes: int = 50  # episodes per commit
    period_s: float = 60.0  # a smaller batch is committed after this long
    video: str | bool = "auto"  # auto | true | false


class _UnfitEpisodeError(Exception):
    """The one that is pending, or in hand, cannot be exported."""

    def __init__(self, ordinal: int, episode_id: str, why: str) -> None:
        super().__init__(why)
        self.ordinal, self.episode_id = ordinal, episode_id


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
        self._quarantine, self._attempt = Quarantine(run_dir), Attempt(run_dir)
        self._encoding, self._committing = Pace("exporting an episode"), Pace("writing the dataset")
        self._alone_until = self._attempt.suspect  # up to this ordinal each episode gets a commit of its own
        self._reopen()

    @busy(OPEN_S, "reading the dataset")
    def _reopen(self) -> None:
        """Stand where the dataset on disk ends; what was pending is taken from the journal again."""
        self._writer = self._open()
        roots = dict.fromkeys([self.dataset, self._writer.root])
        origins = [Origin(root, self._run_dir) for root in roots]
        self._unsettled = [origin for origin in origins if not origin.settled]  # are they this journal's?
        # What a dataset holds was synced, whatever the mark says: after a power cut it is older than the dataset.
        self._stream = EpisodeStream(self._run_dir, self._spec, follow=not self._unsettled)
        self._pending: list[ClosedEpisode] = []
        self._pending_since: float | None = None

    def run(self, stopping: Callable[[float], bool]) -> None:
        """Export until `stopping(seconds to wait)` says so, then once more, so that everything journalled is in.

        Raises JournalCorrupt, SpecChangedError, OSError (disk full) with a message for the user.
        """
        stop = False
        while not stop:
            beat()
            stop = stopping(POLL_S)
            self.poll(flush=stop)

    def poll(self, flush: bool = False) -> None:
        """Take what the journal closed since the last poll; commit a full or old batch, or any with `flush`.

        An episode that cannot be exported is set aside, and what was pending with it is taken again.
        """
        while True:
            try:
                return self._poll(flush)
            except _UnfitEpisodeError as unfit:
                if unfit.ordinal >= 0:
                    self._quarantine.add(unfit.ordinal, unfit.episode_id, str(unfit))
                self._attempt.end()
                self._stream.close()
                self._reopen()
                self._write_status()

    def _poll(self, flush: bool) -> None:
        options = self._options
        for closed in self._stream.poll():
            if self._unsettled and self._foreign(closed):
                return self._poll(flush)
            if closed.ordinal <= self._writer.state.last_ordinal:
                continue
            if self._quarantine.holds(closed.ordinal, closed.info.episode_id):
                continue
            self._take(closed)
            full = self._writer.pending >= options.batch_episodes or self._writer.pending_bytes > MAX_PENDING_BYTES
            if full or closed.ordinal <= self._alone_until:
                self._commit()
        for unfit in self._stream.take_unfit():
            self._quarantine.add_item(unfit.name, unfit.why)
        if self._unsettled and self._foreign(None):
            return self._poll(flush)
        old = self._pending_since is not None and time.monotonic() - self._pending_since >= options.period_s
        # the first episode is shown at once: a reader then finds a dataset, and an unfit task is noticed early
        if flush or old or (self._writer.pending and self._writer.root == self._staging):
            self._commit()
        if self._writer.root == self._staging and self._writer.state.episodes:
            self._promote()

    def close(self) -> None:
        """Close the journal. Episodes that were not committed are taken again at the next start."""
        self._stream.close()
        self._attempt.end()  # an orderly end, whatever raised, is no death
        self._attempt.close()

    def _take(self, closed: ClosedEpisode) -> None:
        """Encode an episode."""
        attempt = self._attempt
        if closed.ordinal == attempt.suspect and attempt.deaths >= MAX_DEATHS:
            why = f"the exporter died {attempt.deaths} times in a row at it"
            raise _UnfitEpisodeError(closed.ordinal, closed.info.episode_id, why)
        attempt.begin(closed.ordinal)
        with self._or_aside(closed), self._encoding.timed():
            added = self._writer.add(closed.ordinal, closed.build())
        attempt.end()
        if added:
            self._pending.append(closed)
            self._pending_since = self._pending_since or time.monotonic()

    @contextlib.contextmanager
    def _or_aside(self, closed: ClosedEpisode) -> Iterator[None]:
        """An exception in here is the episode's fault, unless the disk, the memory or the installation is."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError | ImportError) or getattr(error, "errno", None) in REFUSALS:
                raise
            _log.debug("where it came from", exc_info=True)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise _UnfitEpisodeError(closed.ordinal, closed.info.episode_id, why) from error

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
        self._writer, self._unsettled, self._pending, self._pending_since = self._empty(), [], [], None

    def _commit(self) -> None:
        """Publish what is pending. When that fails for a batch, each of its episodes is tried alone."""
        if not self._pending:
            return
        last = self._pending[-1]
        self._attempt.begin(last.ordinal)
        try:
            with self._or_aside(last), self._committing.timed():
                self._writer.commit()
        except _UnfitEpisodeError as unfit:
            if len(self._pending) == 1:
                raise
            self._alone_until = last.ordinal
            raise _UnfitEpisodeError(-1, "", str(unfit)) from unfit
        self._attempt.end()
        self._pending, self._pending_since = [], None
        self._write_status()

    def _write_status(self) -> None:
        state = self._writer.state
        status = {"episodes": state.episodes, "frames": state.frames, "last_ordinal": state.last_ordinal}
        write_json(self._run_dir / "dataset_status.json", status | {"quarantined": self._quarantine.count})

    def _promote(self) -> None:
        """Put the staged dataset in place of the old one, which is deleted unless it is a foreign one."""
        if self.dataset.exists():
            self.dataset.rename(self._replaced)
        self._staging.rename(self.dataset)
        self._writer.root = self.dataset
        shutil.rmtree(self._discarded, ignore_errors=True)
