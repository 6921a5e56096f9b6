"""Views over the replay ring: the contract, and the view of accepted ticks, at which a training chunk may start.

    algo.view ──▶ learner.wiring ──▶ View ── sample ──▶ batch ──▶ Agent.forward

A view holds indices and gathers batches by them: nothing is copied or deleted when a rule changes. `ChunkView` reads
newly committed episodes from the ring (replay.ring) and asks the acceptance rule about each.
"""

import copy
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from serl_launcher.replay.acceptance import EpisodeColumns, Selection
from serl_launcher.replay.relabelled import as_said
from serl_launcher.replay.ring import EpisodeRow, Evicted, RingReader
from serl_launcher.replay.rulebook import COLUMNS, RuleBook
from serl_launcher.replay.threshold import Threshold
from serl_launcher.replay.verdicts import Verdict
from serl_launcher.run.in_force import Word
from serl_transport.contract.specs import TaskSpec

PATIENCE_EPISODES = 5  # online episodes, all rejected, before the trainer warns
EVERY_ROW = slice(None)
SOURCES = ("demo", "autonomous", "operator")
Words = Callable[[int], Word | None]  # what a person said of the episode with this key (EpisodeRow.key)


def nobody_said(key: int) -> Word | None:
    """Of a run whose episodes nobody judged afterwards."""
    return None


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """A training batch of action chunks. Arrays, or tensors on the device once the agent has prepared it."""

    images: dict[str, np.ndarray]  # camera -> uint8[b, h, w, 3], at the chunk's first tick
    state: np.ndarray  # float32[b, s]
    action: np.ndarray  # float32[b, ah, ad], executed, physical units; padded with the last tick's
    is_pad: np.ndarray  # bool[b, ah], past the episode's end or not a label
    demo: np.ndarray  # bool[b], from a demonstration
    operator: np.ndarray  # bool[b], the operator drove the first tick
    weight: np.ndarray  # float32[b], of the sample in the loss, by its source
    prompts: list[str]  # b, each its own episode's
    prepared: Mapping[str, Any] | None = None  # what the policy's `prepare` made of the observation, once it did

    def __len__(self) -> int:
        return len(self.state)


class View(Protocol):
    """What the trainer asks of a view: is there enough to train on, and a batch of it."""

    def attach(self, ring: RingReader) -> None:
        """Read from this ring; a new one (the gateway restarted) starts the view over."""

    def refresh(self) -> int:
        """Take in the episodes committed since the last call; returns how many."""

    def ready(self, mode: str, min_accepted: int) -> bool:
        """Is there enough to train on in a stage of this mode (`train` or `online`)?"""

    def problem(self, mode: str, min_accepted: int) -> str | None:
        """What is wrong with the data of a stage of this mode, in words; None while nothing is."""

    def sample(self, rng: np.random.Generator, b: int, share: slice = EVERY_ROW) -> Any:
        """A batch of b samples, of the kind that the algorithm's agent takes; it has a length.

        share: the rows of it that are wanted; one rank of several takes its own. What `rng` gives may not depend on it.
        """

    def drop_before(self, frame: int) -> None:
        """Forget what begins before this absolute frame: some rank's ring has lost it."""

    def fingerprint(self) -> int:
        """Of what `sample` draws from: the same number where the same generator gives the same rows."""

    def counts(self) -> dict[str, float]:
        """For the log, under `replay/`."""


class ChunkView:
    """The accepted ticks of a ring, as chunk starts.

    threshold: schedule of m; weights: loss weight of `demo`, `autonomous` and `operator` chunks (1 where not named);
    on_verdict: called with each episode's verdict, in ordinal order, again from the first after `clear`. history: mode
    and return of the episodes between two ordinals, for the threshold: the ring may have lost them. words: what people
    said of episodes; when one is said, whoever owns the view attaches it anew.
    """

    def __init__(
        self,
        rule: Callable[[EpisodeColumns], Selection],
        spec: TaskSpec,
        horizon: int,
        *,
        threshold: Threshold | None = None,
        weights: Mapping[str, float] | None = None,
        on_verdict: Callable[[Verdict], None] = lambda verdict: None,
        history: Callable[[int, int], Iterable[tuple[str, float]]] = lambda after, before: (),
        words: Words = nobody_said,
    ) -> None:
        self._book = RuleBook(rule, spec, threshold)
        self._horizon, self._on_verdict, self._history, self._words = horizon, on_verdict, history, words
        self._weights = _source_weights(weights or {})
        self._cameras = tuple(spec.cameras)
        self._ring: RingReader | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every index; the next `refresh` rebuilds them from the ring."""
        self._next_row, self._last_ordinal = 0, -1
        self._demonstrations: dict[int, Selection] = {}  # accepted ones by ordinal: the ring may move them
        chunk = [
            ("frames", np.int64, (self._horizon,)),  # absolute frame of each tick, clipped at the episode's end
            ("is_pad", bool, (self._horizon,)),
            ("demo", bool),
            ("ordinal", np.int64),
            ("prompt", np.int64),  # place in `_prompts`
        ]
        self._chunks = np.zeros(0, chunk)
        self._prompts: dict[str, int] = {}  # prompt -> its place, in order
        self.accepted: dict[str, int] = {"demo": 0, "online": 0}
        self.seen: dict[str, int] = {"demo": 0, "online": 0}
        self.reasons: Counter[str] = Counter()
        self._book.clear()

    def attach(self, ring: RingReader) -> None:
        if ring is not self._ring:
            self._ring = ring
            self.clear()

    def __len__(self) -> int:
        return len(self._chunks)

    def refresh(self) -> int:
        rows = self._ring.episodes(self._next_row)
        for row in sorted(rows, key=lambda row: row.ordinal):  # a demonstration that moved comes late
            try:
                self._add(row)
            except Evicted:  # the writer lapped a reader that slept for a whole ring: that episode is gone for all
                continue
        if rows:
            self._next_row = rows[-1].row + 1
            self.drop_before(self._ring.first_valid)
        return len(rows)

    def ready(self, mode: str, min_accepted: int) -> bool:
        return len(self) > 0 and (mode != "online" or self.accepted["online"] >= min_accepted)

    def problem(self, mode: str, min_accepted: int) -> str | None:
        seen = self.seen
        if mode == "online" and seen["online"] >= max(PATIENCE_EPISODES, min_accepted) and not self.accepted["online"]:
            return f"all {seen['online']} online episodes were rejected ({self._rejections()}): nothing to learn from"
        if mode == "train" and not sum(seen.values()):
            return "this run holds no episodes yet: record demonstrations first (run_learner_data_collection.sh)"
        if mode == "train" and not len(self):
            return f"all {sum(seen.values())} episodes were rejected ({self._rejections()}): nothing to learn from"
        return None

    def _rejections(self) -> str:
        return ", ".join(f"{reason}: {n}" for reason, n in self.reasons.items() if reason != "accepted" and n)

    def counts(self) -> dict[str, float]:
        known = {"replay/chunks": float(len(self)), "replay/accepted_online": float(self.accepted["online"])}
        threshold = self._book.threshold
        return known if threshold is None else known | {"replay/threshold": threshold.value}

    def _add(self, row: EpisodeRow) -> None:
        if row.ordinal <= self._last_ordinal:
            self._follow(row)
            return
        columns = self._ring.gather(np.arange(row.first_frame, row.first_frame + row.n_ticks), COLUMNS)
        self._book.remember(self._history(self._last_ordinal, row.ordinal))
        self._last_ordinal = row.ordinal
        word = self._words(row.key)
        success, columns = as_said(word, row.success, columns)
        selection, (verdict, *overturned) = self._book.judge(row.ordinal, row.mode, success, columns, word)
        self._on_verdict(verdict)
        self.seen[row.mode] += 1
        self.reasons[verdict.reason] += 1
        if selection.accepted:
            self.accepted[row.mode] += 1
            self._admit(row, selection)
            if row.mode == "demo":
                self._demonstrations[row.ordinal] = selection
        for fallen in overturned:
            self._expel(fallen)

    def _follow(self, row: EpisodeRow) -> None:
        """A demonstration that was judged before lies elsewhere now."""
        if selection := self._demonstrations.get(row.ordinal):
            self._chunks = self._chunks[self._chunks["ordinal"] != row.ordinal]
            self._admit(row, selection)

    def _admit(self, row: EpisodeRow, selection: Selection) -> None:
        n = row.n_ticks
        starts = np.flatnonzero(selection.starts)
        steps = starts[:, None] + np.arange(self._horizon)
        inside = np.minimum(steps, n - 1)
        chunks = np.zeros(len(starts), self._chunks.dtype)
        chunks["frames"], chunks["is_pad"] = row.first_frame + inside, (steps >= n) | ~selection.labels[inside]
        chunks["demo"], chunks["ordinal"] = row.mode == "demo", row.ordinal
        chunks["prompt"] = self._prompts.setdefault(row.prompt, len(self._prompts))
        self._chunks = np.concatenate([self._chunks, chunks])

    def _expel(self, verdict: Verdict) -> None:
        """An accepted episode is imitated no longer."""
        self._on_verdict(verdict)
        self.accepted[verdict.mode] -= 1
        self.reasons["accepted"] -= 1
        self.reasons[verdict.reason] += 1
        self._chunks = self._chunks[self._chunks["ordinal"] != verdict.ordinal]

    def drop_before(self, frame: int) -> None:
        self._chunks = self._chunks[self._chunks["frames"][:, 0] >= frame]

    def fingerprint(self) -> int:
        return zlib.crc32(self._chunks["frames"][:, 0].tobytes())

    def sample(self, rng: np.random.Generator, b: int, share: slice = EVERY_ROW) -> ChunkBatch:
        """b chunks drawn uniformly over the accepted starts. Raises ValueError when there are none."""
        chunks, draws = self._chunks, rng
        while True:
            if not len(chunks):
                raise ValueError("the view holds no accepted tick yet")
            try:
                return self._gather(chunks[draws.integers(0, len(chunks), b)][share])
            except Evicted:  # on this rank alone, perhaps: neither the index nor `rng` may come out of step by it
                chunks, draws = chunks[chunks["frames"][:, 0] >= self._ring.first_valid], copy.deepcopy(rng)

    def _gather(self, chunks: np.ndarray) -> ChunkBatch:
        frames, demo = chunks["frames"], chunks["demo"].copy()
        images = {camera: f"observation.images.{camera}" for camera in self._cameras}
        first = self._ring.gather(frames[:, 0], [*images.values(), "observation.state", "intervention"])
        chunk = self._ring.gather(frames, ["action"])["action"]
        prompts = list(self._prompts)
        return ChunkBatch(
            images={camera: first[key] for camera, key in images.items()},
            state=first["observation.state"],
            action=chunk,
            is_pad=chunks["is_pad"].copy(),
            demo=demo,
            operator=first["intervention"],
            weight=self._weights[np.where(demo, 0, np.where(first["intervention"], 2, 1))],
            prompts=[prompts[place] for place in chunks["prompt"]],
        )


@dataclass(frozen=True, slots=True)
class ViewSources:
    """What a view is made of: the first argument of the class or function that `algo.view` names."""

    spec: TaskSpec
    accepted: ChunkView  # what the acceptance rule lets through; attach and refresh it where it is sampled
    action_horizon: int  # ticks of a policy's chunk
    execute_horizon: int  # ticks of it that the actor executes before it asks again
    words: Words = nobody_said  # what people said of episodes; the ring holds what was recorded


def accepted_chunks(sources: ViewSources) -> ChunkView:
    """The view of the algorithms that imitate what is accepted and need nothing else."""
    return sources.accepted


def _source_weights(weights: Mapping[str, float]) -> np.ndarray:
    """Weights in the order of SOURCES: float32[3]. ValueError for a source that is not known."""
    unknown = [name for name in weights if name not in SOURCES]
    if unknown or any(not w >= 0 for w in weights.values()):
        raise ValueError(f"algo.source_weights: expected weights ≥ 0 of {', '.join(SOURCES)}, got {dict(weights)}")
    return np.array([weights.get(name, 1.0) for name in SOURCES], np.float32)
