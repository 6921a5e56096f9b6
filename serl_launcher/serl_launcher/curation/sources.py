"""Datasets that others are made of, opened: their episodes with what is said of each, as a person chooses by it.

    a run's folder, a LeRobot v3 folder or a hub name ─▶ Opened: rows of meta/episodes ─▶ EpisodeFacts ─▶ Filter.chosen

Nothing is written into a source. Of a run's folder the words that people said afterwards (acts.jsonl) count.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from serl_launcher.datasets.folder import DatasetError, find, read_info, read_parquet
from serl_launcher.replay.relabelled import Label, Relabelled


@dataclass(frozen=True, slots=True)
class EpisodeFacts:
    """One episode, and what its dataset says of it; None: nothing is said."""

    source: int  # place of its dataset among those that were named
    index: int  # LeRobot's episode_index there
    n: int  # rows
    prompts: tuple[str, ...]
    success: bool | None
    said_by: str | None  # who judged it: environment, human, …
    mode: str | None  # demo | online | eval
    stage: str | None
    actor: str | None  # unique_identifier of who recorded it
    helped: float | None  # share of ticks that the operator drove
    versions: tuple[int, int] | None  # lowest and highest policy version that drove; (-1, -1): no policy
    discarded: bool  # a person threw it away
    episode_id: str | None
    people: tuple[str, ...] | None  # who drove some of its ticks and who judged it, at the robot or afterwards
    label: Label | None  # a person's later word, where the source is a run's folder
    row: Mapping[str, Any]  # of meta/episodes, statistics included


class Opened:
    """A source. Raises DatasetError in one line for what is missing, torn or of another format."""

    def __init__(self, source: str, place: int) -> None:
        folder = Path(source).expanduser()
        run = folder if (folder / "dataset" / "meta" / "info.json").is_file() else None
        if run is None and folder.name == "dataset" and (folder.parent / "config.yaml").is_file():
            run = folder.parent
        self.name, self.run = source, run
        self.folder = find(run / "dataset" if run else source)
        self.info = read_info(self.folder)
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.fps = float(self.info["fps"])
        said = Relabelled(run) if run else None
        self.tasks = _tasks(self.folder)
        self.episodes = [_facts(place, row, said, source) for row in self._rows()]
        if not self.episodes:
            raise DatasetError(f"{source}: the dataset holds no episodes")

    @property
    def videos(self) -> list[str]:
        """Columns whose pictures lie in mp4 files."""
        return [key for key, feature in self.features.items() if feature["dtype"] == "video"]

    @property
    def pictures(self) -> list[str]:
        """Columns of pictures, within the rows or in mp4 files."""
        return [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]

    def data_file(self, row: Mapping[str, Any]) -> Path:
        """The file that holds an episode's numbers."""
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        return self.folder / self.info["data_path"].format(**place)

    def video_file(self, key: str, row: Mapping[str, Any]) -> Path:
        """The mp4 that holds an episode's pictures of one column."""
        place = {"chunk_index": row[f"videos/{key}/chunk_index"], "file_index": row[f"videos/{key}/file_index"]}
        return self.folder / self.info["video_path"].format(video_key=key, **place)

    def _rows(self) -> list[dict[str, Any]]:
        files = sorted((self.folder / "meta" / "episodes").rglob("*.parquet"))
        rows = [row for file in files for row in read_parquet(file).to_pylist()]
        rows.sort(key=lambda row: row["episode_index"])
        total = self.info.get("total_episodes", len(rows))
        if len(rows) < total:
            raise DatasetError(f"{self.folder}: meta/info.json counts {total} episodes, meta/episodes {len(rows)}")
        return rows[:total]  # an exporter may be adding to it


@dataclass(frozen=True, slots=True)
class Filter:
    """What is chosen; None: whatever it is."""

    success: bool | None = None
    helped: bool | None = None  # did the operator drive any tick
    modes: Collection[str] | None = None
    stages: Collection[str] | None = None
    actors: Collection[str] | None = None
    operators: Collection[str] | None = None  # one of them drove or judged, each as in a shell
    prompt: str | None = None  # as in a shell: *red*
    versions: tuple[int, int] | None = None  # every version that drove lies within
    episodes: Collection[int] | None = None  # numbers in the one source
    drop: Collection[int] = ()
    discarded: bool = False  # also what a person threw away

    def chosen(self, facts: Sequence[EpisodeFacts]) -> tuple[list[EpisodeFacts], Counter[str]]:
        """Those that are chosen, in order, and how many were left out by which word.

        ValueError: a word asks for what an episode's dataset does not say, or for an episode that is not there.
        """
        self._check_numbers(facts)
        kept, left = [], Counter[str]()
        for one in facts:
            if reason := self._reason(one):
                left[reason] += 1
            else:
                kept.append(one)
        return kept, left

    def _reason(self, one: EpisodeFacts) -> str | None:
        """Why it is left out; None: it is chosen."""
        if one.index in self.drop or (self.episodes is not None and one.index not in self.episodes):
            return "by number"
        if one.discarded and not self.discarded:
            return "thrown away by a person (--discarded takes them)"
        if self.success is not None and _said(one, "success", one.success) != self.success:
            return "--success"
        if self.helped is not None and (_said(one, "helped", one.helped) > 0) != self.helped:
            return "--helped"
        for word, wanted, value in (("mode", self.modes, one.mode), ("stage", self.stages, one.stage),
                                    ("actor", self.actors, one.actor)):  # fmt: skip
            if wanted is not None and _said(one, word, value) not in wanted:
                return f"--{word}"
        if self.operators is not None and not _any(_said(one, "operator", one.people), self.operators):
            return "--operator"
        if self.prompt is not None and not any(fnmatch.fnmatchcase(text, self.prompt) for text in one.prompts):
            return "--prompt"
        if self.versions is not None:
            low, high = _said(one, "versions", one.versions)
            if low < self.versions[0] or high > self.versions[1]:
                return "--versions"
        return None

    def _check_numbers(self, facts: Sequence[EpisodeFacts]) -> None:
        numbers = {*self.drop, *(self.episodes or ())}
        if numbers and len({one.source for one in facts}) > 1:
            raise ValueError("--episodes and --drop name episodes of one dataset; several were given")
        if absent := sorted(numbers - {one.index for one in facts}):
            raise ValueError(f"no episode {absent[0]}; there are 0 to {max(one.index for one in facts)}")


def _said(one: EpisodeFacts, word: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"--{word}: the dataset says nothing of it, episode {one.index} for one")
    return value


def _facts(place: int, row: Mapping[str, Any], said: Relabelled | None, name: str) -> EpisodeFacts:
    try:
        low, high = (_one(row, "complementary_info.policy_version", which) for which in ("min", "max"))
        word = said.words.get(str(row.get("episode_id"))) if said else None
        label = Label(word.success, word.by, word.time) if word and word.success is not None else None
        success = row.get("success")
        if success is None and (told := _one(row, "next.success", "max")) is not None:
            success = bool(told)
        return EpisodeFacts(
            place,
            int(row["episode_index"]),
            int(row["length"]),
            tuple(row["tasks"]),
            label.success if label else success,
            "human, afterwards" if label else row.get("success_source"),
            row.get("mode"),
            row.get("stage"),
            row.get("actor_id"),
            _one(row, "intervention", "mean"),
            None if low is None or high is None else (int(low), int(high)),
            row.get("truncated_by") == "discard" or (word is not None and word.use == "discard"),
            row.get("episode_id"),
            _people(row, word.by if word else None),
            label,
            row,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{name}: meta/episodes lacks what LeRobot v3 has: {error!r}") from None


def _people(row: Mapping[str, Any], later: str | None) -> tuple[str, ...] | None:
    """As the episode's row says, and who spoke afterwards; None: the row says nothing of people, and nobody did."""
    if "drivers" not in row and later is None:
        return None
    names = [*(row.get("drivers") or "").split(", "), row.get("judge") or "", later or ""]
    return tuple(dict.fromkeys(name for name in names if name))


def _any(names: Collection[str], patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _one(row: Mapping[str, Any], column: str, statistic: str) -> float | None:
    """A statistic of an episode's column of single numbers."""
    value = row.get(f"stats/{column}/{statistic}")
    while isinstance(value, list) and value:
        value = value[0]
    return None if value is None or isinstance(value, list) else float(value)


def _tasks(folder: Path) -> list[str]:
    path = folder / "meta" / "tasks.parquet"
    try:
        frame = pd.read_parquet(path).sort_values("task_index")
        return [str(text) for text in frame.index]
    except (OSError, KeyError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def read_modality(folder: Path) -> dict[str, Any] | None:
    """meta/modality.json of a dataset; None where there is none."""
    path = folder / "meta" / "modality.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON: {error}") from None
