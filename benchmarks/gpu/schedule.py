"""One stage after another, each a process with a time-out, within a budget; what happened goes to disk at once.

benchmarks/gpu/__main__.py calls `run_stages`; the processes append their own rows to the same file (`append`). A stage
that fails, hangs or finds no time left costs one row, and the next one begins.

    stages ─▶ enough time left? ─▶ process ─▶ rows of its own ─▶ one row of how it ended
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

RESERVE_S = 5.0  # of the budget, for the table at the end


@dataclass(frozen=True, slots=True)
class Stage:
    """One process of a run."""

    name: str
    needs: float  # seconds: it is not begun with less
    limit: float  # seconds: it is ended then
    what: str = ""  # for people


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines; it is on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole row of the file; a line that a killed process left half written is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Process:
    """A stage's process, in a session of its own so that whatever it started ends with it."""

    def __init__(self, command: Sequence[str], log: IO[str], environment: dict[str, str] | None = None) -> None:
        self.began = time.monotonic()
        env = None if environment is None else os.environ | environment
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env
        )

    def outcome(self, limit: float) -> str:
        """How it ended, after at most `limit` seconds, in words; `ok` for exit code 0."""
        try:
            code = self._child.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            self.end()
            return f"ended after {self.seconds:.0f} s, its limit"
        return "ok" if code == 0 else f"failed, exit code {code}"

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def end(self) -> None:
        """Kill it and its children, and wait until it is gone."""
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


def run_stages(
    stages: Iterable[Stage],
    command: Callable[[str], Sequence[str]],
    results: Path,
    log: IO[str],
    deadline: float,
    say: Callable[[str], None] = print,
) -> bool:
    """Run what there is time for; False when a stage failed or was ended.

    command: a stage's name -> the process; results: where rows go; log: what the processes print; deadline: of
    time.monotonic().
    """
    good = True
    for stage in stages:
        left = deadline - RESERVE_S - time.monotonic()
        if left < stage.needs:
            ended, seconds = f"skipped: needs {stage.needs:.0f} s, {max(0.0, left):.0f} are left", 0.0
        else:
            log.write(f"\n===== {stage.name}: {stage.what}\n")
            log.flush()
            process = Process(command(stage.name), log)
            try:
                ended = process.outcome(min(stage.limit, left))
            finally:
                process.end()
            seconds = process.seconds
            good = good and ended == "ok"
        append(results, {"stage": stage.name, "ended": ended, "seconds": round(seconds, 1)})
        say(f"{stage.name}: {ended}" + (f" in {seconds:.0f} s" if ended == "ok" else ""))
    return good
