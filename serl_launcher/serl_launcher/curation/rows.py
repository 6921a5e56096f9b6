"""The rows of chosen episodes as they stand in the new dataset: what is renumbered, renamed, and nothing else changed.

    an episode's rows in its source ─▶ episode_rows ─▶ the same rows with the new dataset's numbers and prompts

Called by curation.writer, and by curation.check, which compares a written dataset with what this says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from serl_launcher.curation.sources import EpisodeFacts, Opened
from serl_launcher.datasets.folder import DatasetError, read_parquet
from serl_launcher.replay.relabelled import corrected
from serl_transport.contract.schema import Episode, EpisodeInfo, Outcome

RENUMBERED = ("episode_index", "index", "task_index")
OUTCOME = ("next.reward", "next.success", "next.done", "next.truncated")  # of a last row that a person judged anew


@dataclass(frozen=True, slots=True)
class Renaming:
    """New texts for prompts."""

    all: str | None = None  # in place of every text
    one: Mapping[str, str] = field(default_factory=dict)  # old text -> new one

    def __call__(self, text: str) -> str:
        """The text as the new dataset has it."""
        return self.one.get(text, text) if self.all is None else self.all

    def check(self, prompts: Sequence[str]) -> None:
        """ValueError naming a text that is to be renamed and is not there."""
        if absent := [text for text in self.one if text not in prompts]:
            raise ValueError(f"--rename {absent[0]!r}: no episode has that prompt; there are {sorted(set(prompts))}")


class SourceRows:
    """Reads the rows of episodes of one source, a file at a time."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._path: Path | None = None
        self._table: pa.Table | None = None

    def __call__(self, facts: EpisodeFacts) -> pa.Table:
        """An episode's rows, as they lie there. DatasetError where they are not what meta/episodes says."""
        path = self._opened.data_file(facts.row)
        if path != self._path or self._table is None:
            self._path, self._table = path, read_parquet(path)
        numbers = self._table["episode_index"].to_numpy()
        (places,) = np.nonzero(numbers == facts.index)
        if len(places) != facts.n or (len(places) and places[-1] - places[0] + 1 != facts.n):
            raise DatasetError(
                f"{path}, episode {facts.index}: meta/episodes says {facts.n} rows, there are {len(places)}"
            )
        return self._table.slice(int(places[0]), facts.n)


def episode_rows(
    rows: pa.Table, facts: EpisodeFacts, old_tasks: Sequence[str], tasks: Sequence[str], renaming: Renaming,
    number: int, first: int,
) -> pa.Table:  # fmt: skip
    """An episode's rows with the new numbers: episode `number`, its first row at `first`, tasks as the new list has
    them, and the end as a person judged it afterwards."""
    n = len(rows)
    task = [tasks.index(renaming(old_tasks[k])) for k in rows["task_index"].to_pylist()]
    numbers = {
        "episode_index": np.full(n, number, np.int64),
        "index": first + np.arange(n, dtype=np.int64),
        "task_index": np.array(task, np.int64),
    }
    for name, values in (numbers | _outcome(rows, facts)).items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))
    return rows


def _outcome(rows: pa.Table, facts: EpisodeFacts) -> dict[str, np.ndarray]:
    """The columns that a person's later word changes, by the rule that training goes by (replay.relabelled)."""
    if facts.label is None or any(name not in rows.schema.names for name in OUTCOME):
        return {}
    arrays = {name: rows[name].to_numpy() for name in OUTCOME}
    cut = facts.row.get("truncated_by") or None
    info = EpisodeInfo(str(facts.episode_id), "", "", "", "", "online", "", 0, 0.0)
    episode = Episode(info, Outcome(bool(facts.row.get("success")), "environment", cut), arrays)
    return {name: values for name, values in corrected(episode, facts.label.success).arrays.items() if name in OUTCOME}
