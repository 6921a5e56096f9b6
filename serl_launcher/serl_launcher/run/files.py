"""Small JSON files that other processes read while they change: written beside, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, body: Any) -> None:
    """Replace `path` in one step; OSError when the disk refuses."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(body))
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is none, or (after a power cut) half of one."""
    try:
        body = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return body if isinstance(body, dict) else None
