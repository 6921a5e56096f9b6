"""Statistics of a dataset, computed anew from its rows. Called by curation.writer and curation.groot.

Numbers: exact, quantiles too (LeRobot averages the episodes' quantiles, as the exporter does). Pictures: folded from
the episodes' own statistics, since no picture is changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from serl_launcher.exporter.statistics import QUANTILES, Stats, merge, vector_stats

NUMBERS = ("min", "max", "mean", "std", "count", *QUANTILES)


class Collected:
    """features: of info.json; pictures: the columns that hold pictures."""

    def __init__(self, features: Mapping[str, Mapping[str, Any]], pictures: Sequence[str]) -> None:
        text = [key for key, feature in features.items() if feature["dtype"] == "string"]
        self._numbers: dict[str, list[np.ndarray]] = {
            key: [] for key in features if key not in pictures and key not in text
        }
        self._pictures: dict[str, list[Stats]] = {key: [] for key in pictures}

    def add(self, rows: pa.Table, told: Mapping[str, Any]) -> None:
        """An episode's rows, and its row of meta/episodes."""
        for key, parts in self._numbers.items():
            parts.append(numbers(rows[key]))
        for key, parts in self._pictures.items():
            found = {name: told.get(f"stats/{key}/{name}") for name in NUMBERS}
            if all(value is not None for value in found.values()):
                shape = {name: (-1,) if name == "count" else (-1, 1, 1) for name in found}
                parts.append({name: np.array(value, np.float64).reshape(shape[name]) for name, value in found.items()})

    def stats(self) -> dict[str, dict[str, Any]]:
        """stats.json: column -> statistic -> numbers."""
        found = {key: vector_stats(np.concatenate(parts)) for key, parts in self._numbers.items() if parts}
        found |= {key: merge([{key: part} for part in parts])[key] for key, parts in self._pictures.items() if parts}
        return {key: {name: value.tolist() for name, value in stats.items()} for key, stats in found.items()}


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column as [n] or [n, d] in its own dtype."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    flat = array
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(len(array), -1)
