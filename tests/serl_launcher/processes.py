"""Real processes in tests: a quick interpreter, and waiting for what one does."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serl_config.process import process_stat

PATIENCE_S = 30.0


def python(code: str) -> tuple[str, ...]:
    """A quick interpreter (no site packages) that runs `code`."""
    return (sys.executable, "-S", "-c", code)


def wait_for(condition: Callable[[], object], what: str):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"waited {PATIENCE_S} s for {what}")


def gone(pid: int) -> bool:
    fields = process_stat(pid)
    return not fields or fields[0] in "ZX"


def read_pid(path: Path) -> int:
    return int(wait_for(lambda: path.exists() and path.read_text().strip(), f"{path.name}"))
