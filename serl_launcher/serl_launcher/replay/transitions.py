"""Chunk transitions for reinforcement learning, made by index over the replay ring.

The trainer owns one `TransitionView` beside the acceptance view; SAC and DSRL read its batches. Every finished episode
enters, accepted or not: a critic learns from failures.

    tick t ── h executed actions ──▶ tick t + k          k = min(h, n − t) real ticks
    reward Σ_{i<k} γ^i r_{t+i}       discount γ^k        bootstrap unless tick t + k − 1 terminated

A chunk never runs into the next episode. An episode that ended by a time limit or a cut bootstraps from its last
observation (Pardo et al., 1712.00378). Half of a batch comes from demonstrations (RLPD, Ball et al., 2302.02948).
"""

import copy
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from serl_launcher.replay.relabelled import as_said
from serl_launcher.replay.ring import EpisodeRow, Evicted, RingReader
from serl_launcher.replay.views import EVERY_ROW, Words, nobody_said
from serl_transport.contract.specs import TaskSpec

COLUMNS = ("next.reward", "next.done", "intervention")


@dataclass(frozen=True, slots=True)
class TransitionBatch:
    """b chunk transitions; `action[:, :k]` was executed from the observation, `next_*` is what came of it."""

    images: dict[str, np.ndarray]  # camera -> uint8[b, h, w, 3], at the chunk's first tick
    state: np.ndarray  # float32[b, s]
    action: np.ndarray  # float32[b, h, ad], executed, physical units; padded with the last tick's
    is_pad: np.ndarray  # bool[b, h], past the episode's end
    reward: np.ndarray  # float32[b], Σ γ^i r over the real ticks
    discount: np.ndarray  # float32[b], γ^k
    bootstrap: np.ndarray  # bool[b], False where the episode terminated within the chunk
    next_images: dict[str, np.ndarray]  # camera -> uint8[b, h, w, 3], at the chunk's end
    next_state: np.ndarray  # float32[b, s]
    return_to_go: np.ndarray  # float32[b], Σ γ^i r to the episode's end (Cal-QL's reference)
    value_lower_bound: np.ndarray  # float32[b], the return that followed; −inf where it bounds nothing
    demo: np.ndarray  # bool[b], from a demonstration
    prompts: list[str]  # b, each its own episode's
    prepared: Mapping[str, Any] | None = None  # what the policy's `prepare` made of the observation, once it did
    next_prepared: Mapping[str, Any] | None = None  # and of that at the chunk's end

    def __len__(self) -> int:
        return len(self.state)


CHUNK_STARTS = np.dtype(  # a row for each tick of an episode as the first of a chunk
    [
        ("start", np.int64),  # absolute frame of the first tick
        ("last", np.int64),  # absolute frame of the episode's last tick
        ("length", np.int64),  # real ticks k
        ("reward", np.float32),
        ("return_to_go", np.float32),
        ("bootstrap", bool),
        ("terminated", bool),  # the episode did, at its last tick; False where a time limit or a cut ended it
        ("prompt", np.int64),  # which of the view's prompts
    ]
)


def index_stretches(
    first_frame: int,
    reward: np.ndarray,
    done: np.ndarray,
    intervention: np.ndarray,
    horizon: int,
    gamma: float,
    takeover_reward: float | None,
) -> np.ndarray:
    """`index_episode` of an episode in which an operator may have taken over: CHUNK_STARTS[n].

    intervention: bool[n]. takeover_reward: None: the episode is one, so that the chunk which needed help is worth what
    the operator made of it. A number: what the policy did up to a take-over ends there, with that much more reward at
    its last tick and nothing after: 0 for an attempt that failed, less for help that is dear.

    >>> done, helped = np.array([0, 0, 0, 1], bool), np.array([0, 0, 1, 1], bool)
    >>> index = index_stretches(0, np.array([0, 0, 0, 1.0]), done, helped, 4, 1.0, -0.5)
    >>> index["length"].tolist(), index["reward"].tolist(), index["bootstrap"].tolist()
    ([2, 1, 2, 1], [-0.5, -0.5, 1.0, 1.0], [False, False, False, False])
    """
    if takeover_reward is None:
        return index_episode(first_frame, reward, done, horizon, gamma)
    takeovers = np.flatnonzero(intervention[1:] & ~intervention[:-1]) + 1
    reward, done = reward.copy(), done.copy()
    reward[takeovers - 1] += takeover_reward
    done[takeovers - 1] = True
    edges = [0, *takeovers.tolist(), len(reward)]
    return np.concatenate(
        [index_episode(first_frame + a, reward[a:b], done[a:b], horizon, gamma) for a, b in pairwise(edges)]
    )


def index_episode(first_frame: int, reward: np.ndarray, done: np.ndarray, horizon: int, gamma: float) -> np.ndarray:
    """Every tick of an episode as a chunk start: CHUNK_STARTS[n].

    reward: float32[n]; done: bool[n], terminated. The tick that terminates ends the episode, so at most the last is.

    >>> index = index_episode(0, np.array([0, 0, 1.0]), np.array([0, 0, 1], bool), horizon=2, gamma=0.5)
    >>> index["length"].tolist(), index["reward"].tolist(), index["bootstrap"].tolist()
    ([2, 2, 1], [0.0, 0.5, 1.0], [True, False, False])
    """
    n = len(reward)
    ticks = np.arange(n)
    index = np.zeros(n, CHUNK_STARTS)
    index["start"], index["last"] = first_frame + ticks, first_frame + n - 1
    index["length"] = np.minimum(horizon, n - ticks)
    index["bootstrap"] = ~done[ticks + index["length"] - 1]
    index["terminated"] = done.any()
    discounted = np.zeros(n)
    for i in range(min(horizon, n)):
        discounted[: n - i] += gamma**i * reward[i:]
    index["reward"] = discounted
    tail = 0.0
    for t in reversed(ticks):
        index["return_to_go"][t] = tail = reward[t] + gamma * tail
    return index


class TransitionView:
    """Chunk transitions of a ring, demonstrations and online episodes apart; used as a View (replay.views).

    horizon: ticks of a chunk that the actor executes before it asks again. demo_share: of each batch, while both
    sources hold something. words: what people said of episodes (ViewSources). takeover_reward: of `index_stretches`.
    """

    def __init__(
        self,
        spec: TaskSpec,
        horizon: int,
        gamma: float,
        demo_share: float,
        words: Words = nobody_said,
        takeover_reward: float | None = None,
    ) -> None:
        if horizon < 1 or not 0 < gamma <= 1 or not 0 <= demo_share <= 1:
            raise ValueError(
                "algo.view: expected horizon ≥ 1, 0 < gamma ≤ 1 and 0 ≤ demo_share ≤ 1, "
                f"got {horizon}, {gamma} and {demo_share}"
            )
        self.horizon, self.gamma, self.demo_share, self._words = horizon, gamma, demo_share, words
        if takeover_reward is not None and not math.isfinite(takeover_reward):
            raise ValueError(f"algo.view.takeover_reward: expected null or a finite number, got {takeover_reward}")
        self._takeover_reward = takeover_reward
        self._cameras = {camera: f"observation.images.{camera}" for camera in spec.cameras}
        self._ring: RingReader | None = None
        self.clear()

    def clear(self) -> None:
        self._next_row = 0
        self._prompts: dict[str, int] = {}  # prompt -> its place, in order
        self._index = {mode: np.zeros(0, CHUNK_STARTS) for mode in ("demo", "online")}
        self.reward_range = (float("inf"), float("-inf"))  # lowest and highest reward of a tick

    def attach(self, ring: RingReader) -> None:
        if ring is not self._ring:
            self._ring = ring
            self.clear()

    def __len__(self) -> int:
        return sum(map(len, self._index.values()))

    def count(self, source: str) -> int:
        """Chunk starts of `demo` or `online`."""
        return len(self._index[source])

    def refresh(self) -> int:
        rows = self._ring.episodes(self._next_row)
        for row in rows:  # a demonstration that moved comes again, and what it left is dropped below
            self._next_row = row.row + 1
            try:
                self._add(row)
            except Evicted:  # the writer lapped a reader that slept for a whole ring: that episode is gone for all
                continue
        if rows:
            self.drop_before(self._ring.first_valid)
        return len(rows)

    def _add(self, row: EpisodeRow) -> None:
        word = self._words(row.key)
        if word is not None and word.use == "discard":
            return
        columns = self._ring.gather(np.arange(row.first_frame, row.first_frame + row.n_ticks), COLUMNS)
        columns = as_said(word, row.success, columns)[1]
        reward = columns["next.reward"]
        if np.isfinite(reward).all():
            low, high = self.reward_range
            self.reward_range = min(low, float(reward.min())), max(high, float(reward.max()))
            starts = index_stretches(
                row.first_frame,
                reward,
                columns["next.done"],
                columns["intervention"],
                self.horizon,
                self.gamma,
                self._takeover_reward,
            )
            starts["prompt"] = self._prompts.setdefault(row.prompt, len(self._prompts))
            self._index[row.mode] = np.concatenate([self._index[row.mode], starts])

    def drop_before(self, frame: int) -> None:
        """Forget the chunks that begin before this absolute frame."""
        self._index = _from(self._index, frame)

    def fingerprint(self) -> int:
        """Of the chunk starts, in order, and of what bounds their values."""
        starts = [index["start"].tobytes() for index in self._index.values()]
        return zlib.crc32(b"|".join([*starts, repr(self.reward_range).encode()]))

    def sample(self, rng: np.random.Generator, b: int, share: slice = EVERY_ROW) -> TransitionBatch:
        """b transitions, `demo_share` of them from demonstrations. Raises ValueError when the view is empty."""
        index, draws = self._index, rng
        while True:
            n_demo = self._demo_count(index, b)
            parts = [
                rows[draws.integers(0, len(rows), n)]
                for rows, n in zip(index.values(), (n_demo, b - n_demo), strict=True)
                if n
            ]
            try:
                return self._gather(np.concatenate(parts)[share], (np.arange(b) < n_demo)[share])
            except Evicted:  # on this rank alone, perhaps: neither the index nor `rng` may come out of step by it
                index, draws = _from(index, self._ring.first_valid), copy.deepcopy(rng)

    def _demo_count(self, index: Mapping[str, np.ndarray], b: int) -> int:
        demo, online = len(index["demo"]), len(index["online"])
        if not demo and not online:
            raise ValueError("the view holds no transition yet")
        return round(b * self.demo_share) if demo and online else b if demo else 0

    def _gather(self, index: np.ndarray, demo: np.ndarray) -> TransitionBatch:
        steps = np.arange(self.horizon)
        frames = np.minimum(index["start"][:, None] + steps, index["last"][:, None])
        keys = [*self._cameras.values(), "observation.state"]
        chunk = self._ring.gather(frames, ["action"])["action"]
        after = self._ring.gather(index["start"] + index["length"], keys)
        # Oldest frames last: a writer that overtakes this batch is noticed here.
        first = self._ring.gather(index["start"], keys)
        # What came after a cut is not known, and is worth less than nothing only where a reward can be negative.
        bounds = index["terminated"] | (min(self.reward_range[0], self._takeover_reward or 0.0) >= 0)
        return_to_go, prompts = index["return_to_go"].copy(), list(self._prompts)
        return TransitionBatch(
            images={camera: first[key] for camera, key in self._cameras.items()},
            state=first["observation.state"],
            action=chunk,
            is_pad=steps >= index["length"][:, None],
            reward=index["reward"].copy(),
            discount=np.power(self.gamma, index["length"]).astype(np.float32),
            bootstrap=index["bootstrap"].copy(),
            next_images={camera: after[key] for camera, key in self._cameras.items()},
            next_state=after["observation.state"],
            return_to_go=return_to_go,
            value_lower_bound=np.where(bounds, return_to_go, np.float32(-np.inf)),
            demo=demo,
            prompts=[prompts[place] for place in index["prompt"]],
        )


def _from(index: Mapping[str, np.ndarray], frame: int) -> dict[str, np.ndarray]:
    """The chunk starts at this absolute frame or behind it."""
    return {source: rows[rows["start"] >= frame] for source, rows in index.items()}
