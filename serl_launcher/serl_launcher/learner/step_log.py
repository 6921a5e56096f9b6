"""Metrics of training steps on their way to the log and to the gateway's status. Called by the trainer.

    add(step, tensors and numbers) ─▶ [each step's, still on the device] ─ read ─▶ [numbers] ─ write ─▶ a row per step

Reading back makes the host wait for the device: it happens on logged steps and where a version or a checkpoint is due,
in one transfer for all steps since.
"""

import atexit
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from serl_config.clock import steady_time
from serl_launcher.telemetry.metrics import MetricsWriter

log = logging.getLogger("trainer")


@dataclass(frozen=True, slots=True)
class Row:
    """A step's metrics."""

    step: int
    stage: str
    at: float  # unix s
    logged: bool
    metrics: Mapping[str, Tensor | float]  # numbers, once they are read back


class StepLog:
    """period: steps between two that read values back and write; no step is left out."""

    def __init__(self, writer: MetricsWriter, period: int) -> None:
        self._writer, self._period = writer, period
        self._latest: dict[str, Tensor | float] = {}  # since the logged step before
        self._on_device: list[Row] = []
        self._unwritten: list[Row] = []  # read back
        self.shown: dict[str, float] = {}  # of the last logged step that was read back
        atexit.register(self.close)  # before the writer's own

    def due(self, step: int) -> bool:
        """Is this one of the steps that are logged?"""
        return step % self._period == 0

    def add(
        self, step: int, stage: str, metrics: Mapping[str, Tensor | float], once: Mapping[str, float] | None = None
    ) -> bool:
        """True when this step is logged: its row has each loss, one that is not due every step of its last turn since
        the logged step before. The rows between have what they had. `read` and `write` are due then.

        once: what is of this step alone; a step that has such is logged whatever the period.
        """
        self._latest |= metrics
        logged = bool(once) or self.due(step)
        row = self._latest | (once or {}) if logged else metrics
        self._on_device.append(Row(step, stage, steady_time(), logged, dict(row)))
        if logged:
            self._latest = dict(metrics)
        return logged

    def read(self) -> list[Row]:
        """The steps that were added since the last call, their metrics read back."""
        pending, self._on_device = self._on_device, []
        found = numbers(row.metrics for row in pending)
        rows = [Row(row.step, row.stage, row.at, row.logged, m) for row, m in zip(pending, found, strict=True)]
        self.shown = next((dict(row.metrics) for row in reversed(rows) if row.logged), self.shown)
        self._unwritten += rows
        return rows

    def write(self) -> None:
        """What was read back. OSError when the disk refuses: call it again, no row is lost or doubled."""
        while self._unwritten:
            row = self._unwritten[0]
            self._writer.write(row.step, dict(row.metrics) | {"stage": row.stage}, row.at)
            self._unwritten.pop(0)

    @property
    def troubles(self) -> dict[str, str]:
        """Where metrics no longer go, and why, for people."""
        return self._writer.troubles

    def close(self) -> None:
        """With the rows of the last steps, unless the disk refuses them."""
        self.read()
        try:
            self.write()
        except OSError as error:
            log.warning("the metrics of the last %d steps are not written: %s", len(self._unwritten), error.strerror)
        self._writer.close()
        atexit.unregister(self.close)


def numbers(rows: Iterable[Mapping[str, Tensor | float]]) -> list[dict[str, float]]:
    """Scalars of several rows read back, those of one device in one transfer."""
    rows = list(rows)
    tensors = {id(x): x for row in rows for x in row.values() if isinstance(x, Tensor)}
    read: dict[int, float] = {}
    for device in {x.device for x in tensors.values()}:
        mine = {key: x.detach().float().reshape(()) for key, x in tensors.items() if x.device == device}
        read |= zip(mine, torch.stack(list(mine.values())).tolist(), strict=True)
    return [{name: read[id(x)] if id(x) in read else float(x) for name, x in row.items()} for row in rows]
