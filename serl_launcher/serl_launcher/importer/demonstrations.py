"""Demonstrations that a source holds, as episodes of a task: from a LeRobot dataset, or from another run's journal.

    Source ─▶ open_source ─▶ Demonstrations: what there is, what is left out ─▶ batches(wanted): as an actor sends them

An episode is known by its content, so that a source that moved, grew or is named twice brings nothing twice.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from serl_launcher.datasets.columns import Columns
from serl_launcher.datasets.dataset import Dataset, Rows
from serl_launcher.datasets.fitting import Fit, fit, refuse
from serl_launcher.datasets.folder import DatasetError
from serl_launcher.datasets.pictures import resized
from serl_launcher.datasets.source import Source
from serl_launcher.datasets.table import EpisodePlace, Table
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.run.config import task_spec
from serl_launcher.run.foreign import foreign_config
from serl_transport.contract.schema import ACTION, IMAGE_PREFIX, STATE, Episode
from serl_transport.contract.specs import TaskSpec

BATCH_BYTES = 8 << 20  # of pictures in one item, at most, but one tick at least
BATCH_TICKS = 64
Arrays = Mapping[str, np.ndarray]  # of a StepBatch


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One episode that may be imported."""

    number: int  # in its source
    n: int  # ticks
    prompt: str
    digest: str  # of its content

    @property
    def episode_id(self) -> str:
        return f"import-{self.digest}"


class Demonstrations(Protocol):
    """What a source holds."""

    found: list[Demonstration]
    left_out: Counter[str]  # why -> episodes
    notes: list[str]

    def check(self, wanted: Set[str]) -> None:
        """Raise DatasetError for a picture at an end of one of these (by digest) that cannot be read."""

    def batches(self, wanted: Set[str]) -> Iterator[tuple[Demonstration, Iterator[Arrays]]]:
        """The arrays of each of these, item by item; the last has one observation more than ticks."""


def open_source(source: Source, spec: TaskSpec) -> Demonstrations:
    """Raises ValueError naming what is missing or does not fit the task."""
    folder = Path(source.source).expanduser()
    if (folder / "journal").is_dir():
        return RunDemonstrations(source, folder, spec)
    return DatasetDemonstrations(source, spec)


def spans(n: int, spec: TaskSpec) -> Iterator[tuple[int, int]]:
    """First tick and the one after the last of each item: the same whenever an episode is cut up."""
    tick_bytes = 3 * sum(h * w for h, w in spec.cameras.values())
    step = max(1, min(BATCH_TICKS, BATCH_BYTES // tick_bytes))
    for first in range(0, n, step):
        yield first, min(first + step, n)


def _chosen(source: Source, numbers: Sequence[int]) -> Set[int]:
    missing = [number for number in source.episodes or () if number not in numbers]
    if missing:
        raise DatasetError(f"{source.source}: episodes: there is no episode {missing[0]}")
    return set(numbers if source.episodes is None else source.episodes)


def _digest(state: np.ndarray, action: np.ndarray, prompt: str, cameras: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr((prompt, sorted(cameras.items()), state.shape, action.shape)).encode())
    for values in (state, action):
        digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()[:20]


def _check_length(where: str, n: int, spec: TaskSpec) -> None:
    if not 1 <= n <= spec.max_ticks:
        raise DatasetError(f"{where}: {n} ticks, expected 1 to {spec.max_ticks} (the task's max_ticks)")


class DatasetDemonstrations:
    """Episodes of a LeRobot dataset: m rows are m − 1 ticks, the last row's observation is what came of them.

    Its reward and success, where the dataset has them, count for the tick before.
    """

    def __init__(self, source: Source, spec: TaskSpec) -> None:
        self._source, self._spec = source, spec
        self._rows: Rows = Dataset(source).rows(spec)
        self.notes, self.left_out = list(self._rows.notes), Counter[str]()
        self._episodes: dict[str, EpisodePlace] = {}
        self.found: list[Demonstration] = []
        chosen = _chosen(source, [episode.index for episode in self._rows.episodes])
        for episode in self._rows.episodes:
            why = "not chosen" if episode.index not in chosen else self._unfit(episode)
            if why:
                self.left_out[why] += 1
            else:
                self._take(episode)
        if "next.success" not in self._rows.outcomes and not any(e.said for e in self._rows.episodes):
            self.notes.append("the dataset tells no outcomes: every episode counts as a success")

    def _unfit(self, episode: EpisodePlace) -> str | None:
        success = self._rows.outcomes.get("next.success")
        if episode.said.get("mode", "demo") != "demo":
            return f"recorded as {episode.said['mode']}"
        failed = success is not None and not success[episode.first : episode.end].any()
        return "failed" if not episode.said.get("success", not failed) else None

    def _take(self, episode: EpisodePlace) -> None:
        rows, where = self._rows, f"{self._source.source}, episode {episode.index}"
        prompt = rows.prompt(episode.first)
        for row in range(episode.first, episode.end):
            if rows.prompt(row) != prompt:
                raise DatasetError(
                    f"{episode.where(row)}: another task text than at its beginning, {rows.prompt(row)!r}: an episode "
                    "of a run has one; give it with prompt:"
                )
        _check_length(where, len(episode) - 1, self._spec)
        span = slice(episode.first, episode.end)
        digest = _digest(rows.state[span], rows.action[span], prompt, rows.cameras)
        if digest in self._episodes:
            self.left_out["the same as another one"] += 1
            return
        self._episodes[digest] = episode
        self.found.append(Demonstration(episode.index, len(episode) - 1, prompt, digest))

    def check(self, wanted: Set[str]) -> None:
        for digest in wanted & self._episodes.keys():
            episode = self._episodes[digest]
            self._rows.images([episode.first])
            self._rows.images([episode.end - 1])

    def batches(self, wanted: Set[str]) -> Iterator[tuple[Demonstration, Iterator[Arrays]]]:
        for demonstration in self.found:
            if demonstration.digest in wanted:
                yield demonstration, self._arrays(demonstration)

    def _arrays(self, demonstration: Demonstration) -> Iterator[Arrays]:
        rows, first = self._rows, self._episodes[demonstration.digest].first
        per_tick = self._per_tick(self._episodes[demonstration.digest])
        for start, end in spans(demonstration.n, self._spec):
            seen = range(first + start, first + end + (end == demonstration.n))
            pictures = {IMAGE_PREFIX + camera: x for camera, x in rows.images(seen).items()}
            arrays = {key: values[start:end] for key, values in per_tick.items()}
            yield pictures | {STATE: rows.state[seen.start : seen.stop]} | arrays

    def _per_tick(self, episode: EpisodePlace) -> dict[str, np.ndarray]:
        n, outcomes = len(episode) - 1, self._rows.outcomes
        told = {key: values[episode.first : episode.end] for key, values in outcomes.items()}
        reward = np.zeros(n, np.float32)
        reward[-1] = 1.0
        if "next.reward" in told:
            reward = told["next.reward"][:n].copy()
            reward[-1] += told["next.reward"][n]
        last = np.arange(n) == n - 1
        seconds = np.arange(n) / self._spec.control_hz
        return {
            ACTION: self._rows.action[episode.first : episode.first + n],
            "next.reward": reward,
            "next.done": last,
            "next.truncated": np.zeros(n, bool),
            "next.success": last.copy(),
            "intervention": told["intervention"][:n] > 0 if "intervention" in told else np.ones(n, bool),
            "policy_version": np.full(n, -1, np.int64),
            "time_ns": (seconds * 1e9).astype(np.int64),
        }


class RunDemonstrations:
    """Successful demonstrations of another run, as its journal has them and as people corrected them."""

    def __init__(self, source: Source, run: Path, spec: TaskSpec) -> None:
        self._source, self._run, self._spec = source, run, spec
        self._theirs = task_spec(foreign_config(run, "task.spec"))
        self._numbers: dict[int, Demonstration] = {}  # ordinal of their journal ->
        self.left_out = Counter[str]()
        kept: dict[int, tuple[np.ndarray, np.ndarray, str]] = {}
        numbers = []
        for ordinal, episode in self._stream():
            numbers.append(ordinal)
            if why := self._unfit(ordinal, episode):
                self.left_out[why] += 1
                continue
            prompt = source.prompt or episode.info.prompt
            kept[ordinal] = episode.arrays[STATE].copy(), episode.arrays[ACTION].copy(), prompt
        _chosen(source, numbers)
        if not kept:
            raise DatasetError(f"{source.source}: this run holds no successful demonstration ({dict(self.left_out)})")
        self._fit = self._fitted(kept)
        self.notes = list(self._fit.notes)
        for ordinal, (state, action, prompt) in kept.items():
            _check_length(f"{source.source}, episode {ordinal}", len(action), spec)
            values = state[:, self._fit.state], action[:, self._fit.action]
            digest = _digest(*values, prompt, self._fit.cameras)
            self._numbers[ordinal] = Demonstration(ordinal, len(action), prompt, digest)
        self.found = list(self._numbers.values())

    def _stream(self) -> Iterator[tuple[int, Episode]]:
        stream, relabelled = EpisodeStream(self._run, self._theirs, follow=True), Relabelled(self._run)
        try:
            for closed in stream.poll():
                yield closed.ordinal, relabelled.correct(closed.build())
        finally:
            stream.close()

    def _unfit(self, ordinal: int, episode: Episode) -> str | None:
        if self._source.episodes is not None and ordinal not in self._source.episodes:
            return "not chosen"
        if episode.info.mode != "demo":
            return f"recorded as {episode.info.mode}"
        return None if episode.outcome.success else "failed"

    def _fitted(self, kept: Mapping[int, tuple[np.ndarray, np.ndarray, str]]) -> Fit:
        theirs, ends = self._theirs, np.cumsum([len(action) for _, action, _ in kept.values()]).tolist()
        prompts = sorted({prompt for _, _, prompt in kept.values()})
        places = [
            EpisodePlace(ordinal, end - len(kept[ordinal][1]), end, self._run / "journal", {}, {})
            for ordinal, end in zip(kept, ends, strict=True)
        ]
        table = Table(
            np.concatenate([state[: len(action)] for state, action, _ in kept.values()]),
            np.concatenate([action for _, action, _ in kept.values()]),
            np.concatenate([np.full(len(action), prompts.index(prompt)) for _, action, prompt in kept.values()]),
            np.zeros(ends[-1]),
            {},
            prompts,
            places,
        )
        cameras = {camera: (IMAGE_PREFIX + camera, size) for camera, size in theirs.cameras.items()}
        columns = Columns(cameras, [], [], list(theirs.state_names), list(theirs.action_names), None)
        fps = max(1, round(theirs.control_hz))
        found = fit(self._source, columns, table, fps, self._spec)
        refuse(found, self._source.source)
        return found

    def check(self, wanted: Set[str]) -> None:
        """The journal's checksums were compared."""

    def batches(self, wanted: Set[str]) -> Iterator[tuple[Demonstration, Iterator[Arrays]]]:
        for ordinal, episode in self._stream():
            demonstration = self._numbers.get(ordinal)
            if demonstration is not None and demonstration.digest in wanted:
                yield demonstration, self._arrays(episode)

    def _arrays(self, episode: Episode) -> Iterator[Arrays]:
        pictures = {column: IMAGE_PREFIX + camera for camera, column in self._fit.cameras.items()}
        for start, end in spans(episode.n, self._spec):
            arrays = {}
            for key, values in episode.arrays.items():
                if key in pictures:
                    size = self._spec.cameras[pictures[key].removeprefix(IMAGE_PREFIX)]
                    seen = values[start : end + (end == episode.n)]
                    arrays[pictures[key]] = np.stack([resized(picture, size) for picture in seen])
                elif key == STATE:
                    arrays[key] = values[start : end + (end == episode.n), self._fit.state]
                elif not key.startswith(IMAGE_PREFIX):
                    arrays[key] = values[start:end]
            arrays[ACTION] = arrays[ACTION][:, self._fit.action]
            yield arrays | {"policy_version": np.full(end - start, -1, np.int64)}
