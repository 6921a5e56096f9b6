"""Predicted against recorded actions: what a policy would have done at ticks where the recording says what was done.

tools/eval_open_loop.py feeds episodes and draws the result. Two baselines put the figures into proportion: hold still,
and repeat the last recorded action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

METHODS = ("policy", "hold_still", "repeat_last")


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """One episode, chunk after chunk; a chunk starts every `stride` ticks and is compared for `stride` ticks."""

    episode: int
    recorded: np.ndarray  # float32[t, ad], physical
    predicted: dict[str, np.ndarray]  # method -> float32[t, ad], physical
    starts: np.ndarray  # int64[chunks], ticks where a chunk was predicted


def hold_still(
    names: Sequence[str], state_names: Sequence[str], moves: Sequence[int] | None, targets: Mapping[int, int]
) -> Callable:
    """The action that moves nothing: f(state, last action) -> float32[ad].

    Targets (place in the action -> place in the state; where the task names none, actions that are all named as states)
    are the state itself. Of the others the dims in `moves` (all, when None) are rates: zero; the rest keep their last
    value.
    """
    if not targets and set(names) <= set(state_names):
        targets = {place: state_names.index(name) for place, name in enumerate(names)}
    rates = [place for place in (range(len(names)) if moves is None else moves) if place not in targets]

    def hold(state: np.ndarray, last: np.ndarray) -> np.ndarray:
        still = last.copy()
        still[rates] = 0
        still[list(targets)] = state[list(targets.values())]
        return still

    return hold


def run_episode(
    episode: int,
    recorded: np.ndarray,
    states: np.ndarray,
    predict: Callable[[int], np.ndarray],
    still: Callable[[np.ndarray, np.ndarray], np.ndarray],
    stride: int,
) -> OpenLoop:
    """Ask `predict(tick) -> float32[ah, ad]` every `stride` ticks and lay the answers end to end."""
    out = {method: np.zeros_like(recorded) for method in METHODS}
    starts = np.arange(0, len(recorded), stride)
    for start in starts:
        n = min(stride, len(recorded) - start)
        last = recorded[start - 1] if start else np.zeros_like(recorded[0])
        out["policy"][start : start + n] = predict(int(start))[:n]
        out["hold_still"][start : start + n] = still(states[start], last)
        out["repeat_last"][start : start + n] = last
    return OpenLoop(episode, recorded, out, starts)


def figures(episodes: Sequence[OpenLoop], names: Sequence[str], scale: np.ndarray) -> dict:
    """Every figure, per method: errors in the model's units (physical / `scale`) and physical, per joint, and how
    jerky the sequence is (mean |second difference| in the model's units, within chunks and across their seams)."""
    recorded = np.concatenate([e.recorded for e in episodes])
    out: dict = {
        "episodes": len(episodes),
        "ticks": len(recorded),
        "recorded_smoothness": _jerk([e.recorded for e in episodes], scale),
    }
    for method in METHODS:
        error = np.concatenate([e.predicted[method] for e in episodes]) - recorded
        normal = error / scale
        out[method] = {
            "mse_normalised": float(np.square(normal).mean()),
            "mse_physical": float(np.square(error).mean()),
            "max_error_normalised": float(np.abs(normal).max()),
            "smoothness": _jerk([e.predicted[method] for e in episodes], scale),
            "joints": {
                name: {
                    "mse_normalised": float(np.square(normal[:, k]).mean()),
                    "mse_physical": float(np.square(error[:, k]).mean()),
                    "max_error_physical": float(np.abs(error[:, k]).max()),
                }
                for k, name in enumerate(names)
            },
        }
    best = min(out[m]["mse_normalised"] for m in METHODS[1:])
    out["better_than_best_baseline"] = out["policy"]["mse_normalised"] < best
    out["share_of_best_baseline"] = out["policy"]["mse_normalised"] / best if best > 0 else None
    return out


def _jerk(sequences: Sequence[np.ndarray], scale: np.ndarray) -> float:
    steps = [np.abs(np.diff(x / scale, n=2, axis=0)) for x in sequences if len(x) > 2]
    return float(np.concatenate(steps).mean()) if steps else 0.0


def errors_by_tick_of_chunk(episodes: Sequence[OpenLoop], scale: np.ndarray, stride: int) -> dict[str, np.ndarray]:
    """Normalised squared error against the tick's place in its chunk: method -> float64[stride]."""
    place = np.concatenate([np.arange(len(e.recorded)) % stride for e in episodes])
    out = {}
    for method in METHODS:
        error = np.concatenate([np.square((e.predicted[method] - e.recorded) / scale).mean(1) for e in episodes])
        out[method] = np.bincount(place, error, stride) / np.maximum(np.bincount(place, minlength=stride), 1)
    return out
