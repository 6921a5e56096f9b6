"""Metrics of training steps on their way to the log and to the gateway's status. Called by the trainer.

    add(step, tensors and numbers) ─▶ [latest value of each, still on the device] ─each period─▶ numbers ─▶ writer

Reading a value back makes the host wait for the device: that happens on logged steps only.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from serl_launcher.telemetry.metrics import MetricsWriter


class StepLog:
    """period: steps between two logged ones."""

    def __init__(self, writer: MetricsWriter, period: int) -> None:
        self._writer, self._period = writer, period
        self._pending: dict[str, Tensor | float] = {}
        self.shown: dict[str, float] = {}  # of the last logged step

    def add(
        self, step: int, stage: str, metrics: Mapping[str, Tensor | float], once: Mapping[str, float] | None = None
    ) -> bool:
        """True when this step is logged. A loss that is not due every step shows the value of its last turn since the
        logged step before.

        once: what is of this step alone; a step that has such is logged whatever the period.
        """
        self._pending |= metrics
        if once or step % self._period == 0:
            self.shown = numbers(self._pending | (once or {}))
            self._writer.write(step, self.shown | {"stage": stage})
            self._pending = dict(metrics)
            return True
        return False

    @property
    def troubles(self) -> dict[str, str]:
        """Where metrics no longer go, and why, for people."""
        return self._writer.troubles

    def close(self) -> None:
        self._writer.close()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scalars read back from wherever they are."""
    return {name: float(value) for name, value in metrics.items()}
