"""Lines of JSON in a file that grows, and is now and then replaced by its writer. Used by the console and by W&B."""

import json
import os
from pathlib import Path
from typing import Any

LONGEST_READ = 64 << 20  # bytes a look; the rest comes with the next one


class Tail:
    """Remembers how far it has read. A line that is no whole object is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_id: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(is it another file than before, new lines). No file: as an empty one."""
        try:
            with self._path.open("rb") as file:
                return self._read(file)
        except OSError:
            return False, []

    def _read(self, file: Any) -> tuple[bool, list[dict[str, Any]]]:
        stat = os.fstat(file.fileno())
        file_id = (stat.st_dev, stat.st_ino)
        replaced = file_id != self._file_id or stat.st_size < self._offset
        if replaced:
            self._file_id, self._offset = file_id, 0
        file.seek(self._offset)
        block = file.read(LONGEST_READ)
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return replaced, [row for row in map(_object, whole.splitlines()) if row is not None]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
