"""Metrics of training steps on their way to the log and to the gateway's status. Called by the trainer.

    add(step, tensors and numbers) ─▶ [each step's, still on the device] ─each period─▶ a row per step ─▶ writer

Reading a value back makes the host wait for the device: that happens on logged steps only.
"""

import atexit
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from serl_config.clock import steady_time
from serl_launcher.telemetry.metrics import MetricsWriter

log = logging.getLogger("trainer")


class StepLog:
    """period: steps between two that read values back and write; no step is left out."""

    def __init__(self, writer: MetricsWriter, period: int) -> None:
        self._writer, self._period = writer, period
        self._latest: dict[str, Tensor | float] = {}  # since the logged step before
        self._rows: dict[int, tuple[float, str, dict[str, Tensor | float]]] = {}  # not yet written
        self.shown: dict[str, float] = {}  # of the last logged step
        atexit.register(self.close)  # before the writer's own

    def add(
        self, step: int, stage: str, metrics: Mapping[str, Tensor | float], once: Mapping[str, float] | None = None
    ) -> bool:
        """True when this step is logged: its row has each loss, one that is not due every step of its last turn since
        the logged step before. The rows between have what they had.

        once: what is of this step alone; a step that has such is logged whatever the period.
        OSError when the disk refuses: call it again, no row is lost or doubled.
        """
        self._latest |= metrics
        logged = bool(once) or step % self._period == 0
        self._rows[step] = steady_time(), stage, dict(self._latest | (once or {}) if logged else metrics)
        if logged:
            self.shown = numbers(self._rows[step][2])
            self._write()
            self._latest = dict(metrics)
        return logged

    @property
    def troubles(self) -> dict[str, str]:
        """Where metrics no longer go, and why, for people."""
        return self._writer.troubles

    def close(self) -> None:
        """With the rows of the last steps, unless the disk refuses them."""
        try:
            self._write()
        except OSError as error:
            log.warning("the metrics of the last %d steps are not written: %s", len(self._rows), error.strerror)
        self._writer.close()
        atexit.unregister(self.close)

    def _write(self) -> None:
        for step, (at, stage, metrics) in list(self._rows.items()):
            self._writer.write(step, numbers(metrics) | {"stage": stage}, at)
            del self._rows[step]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scalars read back from wherever they are."""
    return {name: float(value) for name, value in metrics.items()}
