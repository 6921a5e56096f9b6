"""Labelled observations from a run's episodes, and their split by episode.

outcome   class 1: the last `positive` observations of a successful episode; class 0: everything of a failed one, and of
          a successful one what lies more than `margin` observations before its end. Between them nobody knows.
process   class k of n: the k-th n-th of a successful episode's length. Failed episodes say nothing about stages.

A label is an index into an episode, so that an episode is never on both sides of a split.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from serl_transport.contract.schema import DISCARD, Episode


@dataclass(frozen=True, slots=True)
class LabelledEpisode:
    """One episode's observations and what is known of them."""

    ordinal: int  # of the journal
    episode_id: str
    success: bool
    images: dict[str, np.ndarray]  # camera -> uint8[n+1, h, w, 3]
    state: np.ndarray  # float32[n+1, s]
    label: np.ndarray  # int64[n+1], a class, or −1 where it is not known


@dataclass(frozen=True, slots=True)
class Split:
    """Episodes by purpose; no episode is in two."""

    train: list[LabelledEpisode]
    validation: list[LabelledEpisode]  # calibrates temperature and threshold
    test: list[LabelledEpisode]  # what is reported


def outcome_labels(n: int, success: bool, positive: int, margin: int) -> np.ndarray:
    """Labels of n+1 observations: int64[n+1].

    >>> outcome_labels(6, True, positive=1, margin=2).tolist()
    [0, 0, 0, 0, -1, -1, 1]
    """
    label = np.zeros(n + 1, np.int64)
    if success:
        label[max(0, n + 1 - positive - margin) :] = -1
        label[n + 1 - positive :] = 1
    return label


def process_labels(n: int, success: bool, stages: int) -> np.ndarray:
    """Stage of each of n+1 observations of a success: int64[n+1]; −1 everywhere for a failure."""
    if not success:
        return np.full(n + 1, -1, np.int64)
    return np.minimum(np.arange(n + 1) * stages // (n + 1), stages - 1)


def label_episodes(
    episodes: Iterable[tuple[int, Episode]], cameras: Sequence[str], kind: str, stages: int, positive: int, margin: int
) -> tuple[list[LabelledEpisode], int]:
    """Labelled copies of (ordinal, episode), and how many were left out because only a classifier judged them.

    A classifier that learns from its own word makes its mistakes the truth. Episodes that nobody judged (a dead actor,
    a stop, a discard) are left out, too; one that ran into its time limit without success is a failure.
    """
    found, unjudged = [], 0
    for ordinal, episode in episodes:
        if episode.outcome.truncated_by in ("dead_actor", "stop", DISCARD):
            continue
        if episode.outcome.success_source == "classifier":
            unjudged += 1
            continue
        success = episode.outcome.success
        if kind == "outcome":
            label = outcome_labels(episode.n, success, positive, margin)
        else:
            label = process_labels(episode.n, success, stages)
        images = {camera: episode.arrays[f"observation.images.{camera}"] for camera in cameras}
        state = episode.arrays["observation.state"]
        found.append(LabelledEpisode(ordinal, episode.info.episode_id, success, images, state, label))
    return found, unjudged


def split_by_episode(
    episodes: Sequence[LabelledEpisode], shares: tuple[float, float], kind: str, rng: np.random.Generator
) -> Split:
    """Successes and failures are divided alike: (validation, test) shares of each, the rest trains.

    Raises ValueError that says which episodes are missing.
    """
    if not (all(0 < share < 1 for share in shares) and sum(shares) < 1):
        raise ValueError(f"validation_share, test_share: expected above 0 and below 1 in sum, got {shares}")
    groups = [[e for e in episodes if e.success], [e for e in episodes if not e.success]]
    if kind == "process":
        groups = groups[:1]
    parts: tuple[list[LabelledEpisode], ...] = ([], [], [])
    for group, name in zip(groups, ("successful", "failed"), strict=False):
        held = [max(1, round(share * len(group))) for share in shares]
        if len(group) < sum(held) + 1:
            total = ", ".join(f"{len(g)} {n}" for g, n in zip(groups, ("successful", "failed"), strict=False))
            raise ValueError(
                f"a reward classifier needs at least {sum(held) + 1} {name} episodes to learn from and be judged by; "
                f"this run has {total}. Record more (an untrained policy's online episodes are failures)"
            )
        order = [group[i] for i in rng.permutation(len(group))]
        parts[1].extend(order[: held[0]])
        parts[2].extend(order[held[0] : sum(held)])
        parts[0].extend(order[sum(held) :])
    return Split(*parts)
