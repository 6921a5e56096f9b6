"""The exporter's loop: journal in, dataset out, exactly once whatever is killed when.

    journal ─▶ EpisodeStream.poll ─▶ DatasetWriter.add … commit ─▶ dataset/            (dataset_status.json beside it)

The dataset itself says which ordinal comes next. One that does not exist yet, or that cannot be continued (another
task's features, a foreign journal), is built in `dataset.staging/` and takes its place by rename once it has caught up.
"""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serl_launcher.exporter.layout import INFO_PATH, write_json
from serl_launcher.exporter.recovery import UnusableDataset
from serl_launcher.exporter.writer import DatasetWriter
from serl_launcher.replay.episodes import EpisodeStream
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
        self._replaced: Path | None = None  # where a dataset goes that is not ours to delete
        self._writer = self._open()
        self._stream = EpisodeStream(run_dir, spec, first_ordinal=max(0, self._writer.state.last_ordinal), follow=True)
        self._checked = self._writer.state.last_ordinal < 0
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
            if not self._checked and not self._check_origin(closed.ordinal, closed.info.episode_id):
                return self.poll(flush)
            if self._writer.add(closed.ordinal, closed.build()) and self._pending_since is None:
                self._pending_since = time.monotonic()
            if self._writer.pending >= options.batch_episodes or self._writer.pending_bytes > MAX_PENDING_BYTES:
                self._commit()
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
        if not (self.dataset / INFO_PATH).exists() and not self.dataset.exists() and self._staging.exists():
            with contextlib.suppress(UnusableDataset):  # killed between the two renames of `_promote`
                return DatasetWriter(self._staging, self._spec, self._video)
        if self.dataset.exists():
            try:
                return DatasetWriter(self.dataset, self._spec, self._video)
            except UnusableDataset as error:
                _log.warning("%s; building it anew from the journal", error)
        return self._fresh()

    def _fresh(self) -> DatasetWriter:
        try:
            return DatasetWriter(self._staging, self._spec, self._video)
        except UnusableDataset:
            shutil.rmtree(self._staging)
            return DatasetWriter(self._staging, self._spec, self._video)

    def _check_origin(self, ordinal: int, episode_id: str) -> bool:
        """Is the dataset's newest episode the journal's of that ordinal? If not, start anew and keep the old one."""
        self._checked = True
        state = self._writer.state
        if ordinal == state.last_ordinal and episode_id == state.last_episode_id:
            return True
        self._replaced = self._run_dir / f"dataset.foreign-{time.time_ns()}"
        _log.warning(
            "%s ends with episode %s, the journal has %s there: it is not this journal's dataset; moving it to %s",
            self.dataset, state.last_episode_id, episode_id, self._replaced.name,
        )  # fmt: skip
        self._stream.close()
        self._stream = EpisodeStream(self._run_dir, self._spec, follow=True)
        self._writer = self._fresh()
        return False

    def _commit(self) -> None:
        self._writer.commit()
        self._pending_since = None
        state = self._writer.state
        status = {"episodes": state.episodes, "frames": state.frames, "last_ordinal": state.last_ordinal}
        write_json(self._run_dir / "dataset_status.json", status)

    def _promote(self) -> None:
        """Put the staged dataset in place of the old one."""
        old = self._replaced or self._run_dir / "dataset.replaced"
        if self.dataset.exists():
            shutil.rmtree(self._run_dir / "dataset.replaced", ignore_errors=True)
            os.rename(self.dataset, old)
        os.rename(self._staging, self.dataset)
        self._writer.root = self.dataset
        if self._replaced is None:
            shutil.rmtree(old, ignore_errors=True)
        self._replaced = None
