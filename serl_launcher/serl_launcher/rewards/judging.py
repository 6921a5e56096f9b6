"""From probabilities of observations to a verdict on an episode, and how good such verdicts are. Pure functions."""

import numpy as np

from serl_config.reward_stages import stage_after


def episode_score(success_probability: np.ndarray, patience: int) -> float:
    """The highest threshold at which the episode still counts as a success: `patience` observations in a row reach it.

    >>> episode_score(np.array([0.1, 0.9, 0.2, 0.6, 0.7]), patience=2)
    0.6
    """
    if len(success_probability) < patience:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(success_probability, patience)
    return float(windows.min(axis=1).max())


def verdict_at(success_probability: np.ndarray, threshold: float, patience: int) -> int | None:
    """The observation with which an episode is called a success; None when it never is.

    >>> verdict_at(np.array([0.1, 0.9, 0.2, 0.6, 0.7, 0.8]), threshold=0.5, patience=2)
    4
    """
    if len(success_probability) < patience:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(success_probability >= threshold, patience).all(axis=1)
    return int(windows.argmax()) + patience - 1 if windows.any() else None


def stages_reached(probabilities: np.ndarray) -> np.ndarray:
    """The furthest stage after each observation, as the actor counts them: int64[n] of float32[n, classes].

    >>> stages_reached(np.eye(4)[[0, 3, 1, 3, 3]])
    array([0, 1, 1, 2, 3])
    """
    reached, stage = np.zeros(len(probabilities), np.int64), 0
    for i, said in enumerate(probabilities):
        reached[i] = stage = stage_after(stage, said)
    return reached


def confusion(truth: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    """int64[classes, classes], rows the truth, columns what was said."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (np.asarray(truth, int), np.asarray(said, int)), 1)
    return table


def balanced_accuracy(table: np.ndarray) -> float:
    """Mean recall over the classes that occur."""
    totals = table.sum(axis=1)
    return float((table.diagonal()[totals > 0] / totals[totals > 0]).mean())


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold of highest balanced accuracy, in the middle of its range: what separates most safely.

    scores: float[n]; truth: bool[n]. A score counts as success when it is ≥ the threshold.
    """
    edges = np.unique(np.concatenate([[0.0], scores, [1.0]]))
    middles = (edges[1:] + edges[:-1]) / 2
    quality = [balanced_accuracy(confusion(truth, scores >= m, 2)) for m in middles]
    best = np.flatnonzero(np.isclose(quality, max(quality)))
    widest = best[np.argmax((edges[1:] - edges[:-1])[best])]
    return float(middles[widest])


def precision_recall(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at each distinct score, from the strictest on."""
    thresholds = np.unique(scores)[::-1]
    said = scores[None, :] >= thresholds[:, None]
    hits = (said & truth).sum(axis=1)
    return hits / said.sum(axis=1), hits / max(1, int(truth.sum()))
