"""Per-feature statistics as LeRobot's normalisation wants them: min, max, mean, std, count and five quantiles.

The writer computes them per episode (they become `stats/...` columns of the episodes file) and folds them into
stats.json with `merge`; recovery folds the columns again. Vectors have shape [d], images [3, 1, 1] scaled to 0..1.
"""

from collections.abc import Iterable, Mapping

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MAX_IMAGE_SIDE = 150  # larger images are strided down before their histogram is taken
MAX_IMAGES = 100  # frames of an episode that enter its image statistics

Stats = dict[str, np.ndarray]  # statistic -> float64[d] or float64[3, 1, 1]; count: int64[1]


def vector_stats(rows: np.ndarray) -> Stats:
    """Statistics over the first axis of `rows`, any numeric dtype [n] or [n, d]; n at least 1."""
    values = np.asarray(rows, np.float64).reshape(len(rows), -1)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def image_stats(images: np.ndarray) -> Stats:
    """Per-channel statistics of uint8[n, h, w, 3], from a 256-bin histogram of a subset of frames and pixels."""
    step = max(1, max(images.shape[1:3]) // MAX_IMAGE_SIDE)
    frames = np.unique(np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).round().astype(int))
    sample = images[frames, ::step, ::step]
    histogram = np.stack([np.bincount(sample[..., channel].ravel(), minlength=256) for channel in range(3)])
    level = np.arange(256) / 255.0
    share = histogram / histogram.sum(1, keepdims=True)
    cumulative = share.cumsum(1)
    mean = share @ level
    stats = {
        "min": level[(histogram > 0).argmax(1)],
        "max": level[255 - (histogram[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ level**2 - mean**2, 0.0)),
        **{name: level[(cumulative >= q - 1e-12).argmax(1)] for name, q in QUANTILES.items()},
    }
    return {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": np.array([len(frames)])}


def merge(parts: Iterable[Mapping[str, Stats]]) -> dict[str, Stats]:
    """Statistics of the union: exact but for the quantiles, which are the parts' count-weighted means as in LeRobot."""
    parts = list(parts)
    return {key: _merge_feature([part[key] for part in parts]) for key in (parts[0] if parts else ())}


def _merge_feature(parts: list[Stats]) -> Stats:
    counts = np.array([part["count"][0] for part in parts])
    weights = counts / counts.sum()

    def average(values: list[np.ndarray]) -> np.ndarray:
        return np.tensordot(weights, np.stack(values), axes=1)

    mean = average([part["mean"] for part in parts])
    variance = average([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([counts.sum()]),
        **{name: average([part[name] for part in parts]) for name in QUANTILES},
    }
