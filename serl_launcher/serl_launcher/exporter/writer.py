"""Writes episodes into a LeRobotDataset v3 that readers may open at any moment.

    add(ordinal, episode) ─▶ pending rows (PNG) or an mp4 under construction
    commit()              ─▶ data ▸ videos ▸ tasks ▸ episodes ▸ stats ▸ info

LeRobot reads info, tasks, episodes, then data; the writer publishes in the opposite order, every file by rename. So a
reader's counts never exceed what is there. LeRobot's own writer was measured instead of this one (docs/LOG.md): in
place it blocks readers during a batch and cannot resume after a kill, and it costs four to ten times the CPU.
The exporter role owns the one instance.
"""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from serl_launcher.exporter.columns import NEWER, episode_columns, episode_row, episode_stats, episode_table
from serl_launcher.exporter.features import frame_rate, image_keys
from serl_launcher.exporter.layout import DATA_PATH, EPISODES_PATH, VIDEO_PATH, address, place
from serl_launcher.exporter.metadata import DatasetState, Row, write_derived, write_tasks
from serl_launcher.exporter.recovery import file_sums, recover
from serl_launcher.exporter.video import CameraVideo
from serl_launcher.run.files import PART, publish, write_whole
from serl_transport.contract.schema import Episode
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)


class DatasetWriter:
    """Appends episodes in ordinal order, a batch per commit. Opening a folder recovers it (see `recovery`)."""

    def __init__(self, root: Path, spec: TaskSpec, video: bool) -> None:
        """Raises UnusableDataset when the folder holds another task's data."""
        self.root = root
        self._spec = spec
        self._video = video
        self.state: DatasetState = recover(root, spec, video)
        self._absent = self._columns_absent()
        self._tables: list[pa.Table] = []  # one per pending episode
        self._rows: list[Row] = []  # one per pending episode
        self._videos: dict[str, CameraVideo] = {}

    def _columns_absent(self) -> set[str]:
        """Columns that the committed episodes lack, of an older release: readers want the same ones in every file."""
        if not self.state.commits:
            return set()
        absent = set(NEWER) - set(pq.read_schema(self.root / place(EPISODES_PATH, 0)).names)
        if absent:
            lacking = ", ".join(sorted(absent))
            log.warning("an older release began %s: its episodes lack %s, episodes.jsonl has them", self.root, lacking)
        return absent

    @property
    def pending(self) -> int:
        """Episodes added since the last commit."""
        return len(self._rows)

    @property
    def pending_bytes(self) -> int:
        """Memory the pending rows hold."""
        return sum(table.nbytes for table in self._tables)

    def add(self, ordinal: int, episode: Episode) -> bool:
        """Encode an episode; False, and nothing done, when it was written before or has no tick."""
        newest = self._rows[-1]["episode_ordinal"] if self._rows else self.state.last_ordinal
        if ordinal <= newest or episode.n == 0:
            return False
        spec, commit = self._spec, self.state.commits
        episode_index = self.state.episodes + self.pending
        first = self.state.frames + sum(row["length"] for row in self._rows)
        columns = episode_columns(episode, spec, ordinal, episode_index, first, self._task_index(episode.info.prompt))
        row = episode_row(episode, ordinal, episode_stats(columns, episode, spec)) | {
            "episode_index": episode_index,
            "dataset_from_index": first,
            "dataset_to_index": first + episode.n,
        }
        row |= address("data", commit) | address("meta/episodes", commit)
        if self._video:
            row |= self._add_video(episode)
        self._tables.append(episode_table(columns, episode, spec, self._video))
        self._rows.append(row)
        return True

    def commit(self) -> None:
        """Publish the pending episodes."""
        if not self._rows:
            return
        commit, before, state = self.state.commits, self.state, self.state.after(self._rows)
        write_whole(self.root / place(DATA_PATH, commit), self._write_data, durable=True)
        for key, video in self._videos.items():
            video.finish()
            publish(self._video_path(key, PART), self._video_path(key), durable=True)
        if state.tasks != before.tasks:
            write_tasks(self.root, state.tasks)
        table = pa.Table.from_pylist(self._rows).drop_columns(sorted(self._absent))
        table = table.replace_schema_metadata(file_sums(self.root, commit, [*self._videos]))
        write_whole(
            self.root / place(EPISODES_PATH, commit),
            lambda path: pq.write_table(table, path, write_page_checksum=True),
            durable=True,
        )
        write_derived(self.root, self._spec, self._video, state)
        self.state, self._tables, self._rows, self._videos = state, [], [], {}

    def _task_index(self, prompt: str) -> int:
        known = dict.fromkeys([*self.state.tasks, *(row["tasks"][0] for row in self._rows), prompt])
        return list(known).index(prompt)

    def _add_video(self, episode: Episode) -> dict[str, float]:
        """Feed the cameras' mp4s; returns where in them the episode lies."""
        row: dict[str, float] = {}
        fps = frame_rate(self._spec)
        for key, (height, width) in zip(image_keys(self._spec), self._spec.cameras.values(), strict=True):
            if key not in self._videos:
                self._videos[key] = CameraVideo(self._video_path(key, PART), height, width, fps)
            video = self._videos[key]
            start = video.frames
            video.add(episode.arrays[key][: episode.n])
            row |= address(f"videos/{key}", self.state.commits)
            row |= {f"videos/{key}/from_timestamp": start / fps, f"videos/{key}/to_timestamp": video.frames / fps}
        return row

    def _video_path(self, key: str, suffix: str = "") -> Path:
        return self.root / (place(VIDEO_PATH, self.state.commits, video_key=key) + suffix)

    def _write_data(self, path: Path) -> None:
        """One row group per episode, so that a reader of one episode touches only its bytes."""
        with pq.ParquetWriter(path, self._tables[0].schema, compression="snappy") as writer:
            for table in self._tables:
                writer.write_table(table)
