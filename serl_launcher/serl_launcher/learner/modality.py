"""modality.json of GR00T's data format: which slices of which columns are state, action and video.

Read beside a LeRobot dataset (`meta/modality.json`) by examples/train_sft.py. Ranges are half-open: start 0 and end 5
are dims 0 … 4. A part's name becomes the names of its dims, `arm.0 … arm.4`.
"""

import json
from pathlib import Path
from typing import Any

from serl_launcher.learner.sft import Columns

DEFAULT = {"state": "observation.state", "action": "action"}


class Modality:
    """The parsed file; `columns` for the reader, `names` of the dims for the task."""

    def __init__(self, content: dict[str, Any], where: str) -> None:
        self.content, self.where = content, where
        for section in ("state", "action", "video"):
            if not isinstance(content.get(section), dict) or not content[section]:
                raise ValueError(f"{where}: expected a section {section!r} with at least one entry")
        self.columns = Columns(
            {name: entry.get("original_key", f"observation.images.{name}") for name, entry in content["video"].items()},
            self._parts("state"),
            self._parts("action"),
        )

    @classmethod
    def read(cls, dataset: Path) -> "Modality | None":
        """`meta/modality.json` of a dataset, None where there is none. Raises ValueError naming what is wrong."""
        path = Path(dataset) / "meta" / "modality.json"
        if not path.is_file():
            return None
        try:
            return cls(json.loads(path.read_text()), str(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None

    def _parts(self, section: str) -> list[tuple[str, slice]]:
        parts = []
        for name, entry in self.content[section].items():
            start, end = entry.get("start"), entry.get("end")
            if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end:
                raise ValueError(f"{self.where}: {section}.{name}: expected 0 <= start < end, got {start} and {end}")
            parts.append((entry.get("original_key", DEFAULT[section]), slice(start, end)))
        return parts

    def names(self, section: str) -> list[str]:
        """A name for each dim of `state` or `action`."""
        return [
            f"{name}.{k}" for name, entry in self.content[section].items() for k in range(entry["end"] - entry["start"])
        ]
