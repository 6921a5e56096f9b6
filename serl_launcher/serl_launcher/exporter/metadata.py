"""What a dataset holds, and the three files in `meta/` that are derived from it: info.json, stats.json, tasks.parquet.

The rows of the episodes files are the record. `DatasetState` is their sum: the writer adds the rows of each commit to
it, recovery adds up all of them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.exporter.features import dataset_features, frame_rate
from serl_launcher.exporter.layout import (
    DATA_PATH,
    FILES_PER_CHUNK,
    INFO_PATH,
    STATS_PATH,
    TASKS_PATH,
    VIDEO_PATH,
)
from serl_launcher.exporter.statistics import Stats, merge
from serl_launcher.run.files import write_json, write_whole
from serl_transport.contract.specs import TaskSpec

CODEBASE_VERSION = "v3.0"
Row = dict[str, Any]  # of an episodes file


@dataclass(frozen=True, slots=True)
class DatasetState:
    """What the committed part of a dataset holds."""

    commits: int = 0  # number of the next commit
    episodes: int = 0  # finished episodes written
    frames: int = 0  # rows written
    last_ordinal: int = -1  # journal ordinal of the newest episode; -1: none
    tasks: list[str] = field(default_factory=list)  # prompts in order of first use; the position is the task_index
    stats: dict[str, Stats] = field(default_factory=dict)  # statistics of everything written

    def after(self, *batches: list[Row]) -> "DatasetState":
        """The state after the commits with these episode rows, none of them empty."""
        rows = [row for batch in batches for row in batch]
        if not rows:
            return self
        return DatasetState(
            commits=self.commits + len(batches),
            episodes=self.episodes + len(rows),
            frames=self.frames + sum(row["length"] for row in rows),
            last_ordinal=rows[-1]["episode_ordinal"],
            tasks=list(dict.fromkeys([*self.tasks, *(task for row in rows for task in row["tasks"])])),
            stats=merge([*([self.stats] if self.stats else []), *map(_stats_of, rows)]),
        )


def write_derived(root: Path, spec: TaskSpec, video: bool, state: DatasetState) -> None:
    """stats.json, then info.json: the counts a reader starts from come last when a dataset grows."""
    stats = {key: {name: value.tolist() for name, value in values.items()} for key, values in state.stats.items()}
    write_json(root / STATS_PATH, stats, indent=2, durable=True)
    write_json(root / INFO_PATH, _info(spec, video, state), indent=2, durable=True)


def write_tasks(root: Path, tasks: list[str]) -> None:
    """meta/tasks.parquet: a pandas frame indexed by the prompt, as LeRobot writes it."""
    import pandas

    frame = pandas.DataFrame({"task_index": range(len(tasks))}, index=pandas.Index(tasks, name="task", dtype=object))
    write_whole(root / TASKS_PATH, frame.to_parquet, durable=True)


def _info(spec: TaskSpec, video: bool, state: DatasetState) -> dict[str, Any]:
    return {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": spec.name,
        "fps": frame_rate(spec),
        "features": dataset_features(spec, video),
        "total_episodes": state.episodes,
        "total_frames": state.frames,
        "total_tasks": len(state.tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if video else None,
        "splits": {"train": f"0:{state.episodes}"},
    }


def _stats_of(row: Row) -> dict[str, Stats]:
    """The `stats/<feature>/<statistic>` columns of an episode's row."""
    stats: dict[str, Stats] = {}
    for column, value in row.items():
        if column.startswith("stats/"):
            key, name = column.removeprefix("stats/").rsplit("/", 1)
            stats.setdefault(key, {})[name] = np.array(value)
    return stats
