"""What a stage found, row by row: a figure is on disk before the next one is taken. Every stage holds one `Record`.

{"stage": …, "name": …, "value": …, "unit": …, more}     a figure; `case`, `work`, `batch`, `bytes` say what its
                                                          floor and forecast are worked out from (gpu.table)
{"stage": …, "name": …, "trouble": …}                    a part of a stage that failed; the parts after it still run
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.schedule import append


class Record:
    """Rows of one stage. failed: whether a part of it did, or the policy's log warned (a layer that runs uncompiled, a
    batch without a graph: figures of another path than is meant)."""

    def __init__(self, results: Path, stage: str) -> None:
        self._results, self._stage = results, stage
        self.failed = False

    def watch_log(self) -> None:
        """Take what the policy's log says and warns of from now on."""
        log = logging.getLogger("policy")
        log.setLevel(logging.INFO)
        log.addHandler(_Log(self))

    def trouble(self, name: str, words: str) -> None:
        """Something is not as it is meant."""
        self.failed = True
        append(self._results, {"stage": self._stage, "name": name, "trouble": words[:300]})

    def figure(self, name: str, value: Any, unit: str = "", **more: Any) -> None:
        """One figure; a number keeps four significant digits."""
        shown = float(f"{value:.4g}") if isinstance(value, float) else value
        row = {"stage": self._stage, "name": name, "value": shown, "unit": unit} | more
        append(self._results, row)
        print(row, flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the stage whose failure, memory that runs out included, is a row and not the end."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            words = (str(error).strip().splitlines() or [""])[0]
            self.trouble(name, f"{type(error).__name__}: {words}")


class _Log(logging.Handler):
    """The policy's log: what it says becomes a row, what it warns of a trouble."""

    def __init__(self, record: Record) -> None:
        super().__init__(logging.INFO)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._record.trouble("log", record.getMessage())
        else:
            self._record.figure("log", record.getMessage())
