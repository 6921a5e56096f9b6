"""A LeRobot dataset, opened: what it says of itself, and its rows in a task's terms.

    Dataset(source) ─▶ spec(): the task that it describes        fine-tuning
                    ─▶ fit(spec): what is wrong with it          preflight
                    ─▶ rows(spec) ─▶ Rows                        fine-tuning, open-loop evaluation, demos=

Numbers are read and checked at once, pictures when they are asked for. No torch before the first picture.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serl_launcher.datasets.columns import read_columns
from serl_launcher.datasets.fitting import Fit, fit, refuse
from serl_launcher.datasets.folder import find, read_info
from serl_launcher.datasets.pictures import Pictures
from serl_launcher.datasets.source import Source
from serl_launcher.datasets.table import EpisodePlace, Table, read_table
from serl_transport.contract.specs import TaskSpec


class Dataset:
    """Raises DatasetError for what is missing, torn, of another format, or no number."""

    def __init__(self, source: Source | str | Path) -> None:
        self.source = source if isinstance(source, Source) else Source(str(source))
        self.folder = find(self.source.source)
        info = read_info(self.folder)
        self.fps = float(info["fps"])
        self.columns = read_columns(self.folder, info["features"])
        self.table = read_table(self.folder, info, self.columns)

    def fit(self, spec: TaskSpec) -> Fit:
        """How it becomes the task's, and what is wrong with it."""
        return fit(self.source, self.columns, self.table, self.fps, spec)

    def rows(self, spec: TaskSpec) -> "Rows":
        """Its rows in the task's terms. Raises DatasetError naming what does not fit."""
        found = self.fit(spec)
        refuse(found, self.source.source)
        return Rows(self, spec, found)

    def spec(self) -> TaskSpec:
        """The task that it describes: cameras and sizes, its first prompt, the range of its values."""
        table, columns = self.table, self.columns
        (state_low, state_high), (action_low, action_high) = _range(table.state), _range(table.action)
        return TaskSpec.from_dict(
            {
                "name": "dataset",
                "prompt": self.source.prompt or table.prompts[int(table.prompt[0])],
                "cameras": {camera: list(size) for camera, (_, size) in columns.cameras.items()},
                "state_names": columns.state_names or [f"s{k}" for k in range(len(state_low))],
                "state_low": state_low,
                "state_high": state_high,
                "action_names": columns.action_names or [f"a{k}" for k in range(len(action_low))],
                "action_low": action_low,
                "action_high": action_high,
                "control_hz": self.fps,
                "max_ticks": max(map(len, table.episodes)),
            }
        )


def _range(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Lowest and highest value; a dim that never moved gets a range around its value."""
    low, high = values.min(0).astype(float), values.max(0).astype(float)
    flat = high <= low
    return np.where(flat, low - 1, low).tolist(), np.where(flat, high + 1, high).tolist()


def _picked(names: list[str] | None, order: list[int]) -> list[str] | None:
    return None if names is None else [names[k] for k in order]


class Rows:
    """A dataset's rows as a task has them: its dims in its order, its cameras in its sizes."""

    def __init__(self, dataset: Dataset, spec: TaskSpec, found: Fit) -> None:
        table = dataset.table
        self.dataset, self.spec, self.notes, self.cameras = dataset, spec, found.notes, found.cameras
        self.state = table.state[:, found.state]  # float32[rows, s]
        self.action = table.action[:, found.action]  # float32[rows, ad]
        names = dataset.columns  # the dataset's own names in the task's order; the task's where it gives none
        self.state_names = _picked(names.state_names, found.state) or list(spec.state_names)
        self.action_names = _picked(names.action_names, found.action) or list(spec.action_names)
        self.episodes: list[EpisodePlace] = table.episodes
        # Rows of each episode, first and past the last.
        self.bounds = [(episode.first, episode.end) for episode in table.episodes]
        self._episode_of = np.repeat(np.arange(len(self.episodes)), [len(episode) for episode in self.episodes])
        self._table: Table = table
        self._prompts = table.prompts if dataset.source.prompt is None else [dataset.source.prompt] * len(table.prompts)
        self._pictures = Pictures(dataset.folder, found.cameras, spec.cameras)

    def __len__(self) -> int:
        return len(self.state)

    def episode(self, row: int) -> EpisodePlace:
        """The episode that a row is of."""
        return self.episodes[self._episode_of[row]]

    def prompt(self, row: int) -> str:
        """The row's own task text."""
        return self._prompts[self._table.prompt[row]]

    def images(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """camera -> uint8[n, h, w, 3] of rows of one episode. Raises DatasetError naming the file and frame."""
        return self._pictures.of(self.episode(rows[0]), rows, [float(self._table.timestamp[row]) for row in rows])

    def chunk(self, row: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """The actions from a row on, the last one repeated past the episode's end: float32[ah, ad], bool[ah] there."""
        steps, end = row + np.arange(horizon), self.episode(row).end
        return self.action[np.minimum(steps, end - 1)], steps >= end

    @property
    def outcomes(self) -> dict[str, np.ndarray]:
        """Reward, success and intervention of every row, where the dataset has them: float32[rows] each."""
        return dict(self._table.outcomes)
