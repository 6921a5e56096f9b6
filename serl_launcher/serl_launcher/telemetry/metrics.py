"""Where training metrics go: metrics/trainer.jsonl always, TensorBoard and W&B as the config says.

The trainer calls `write(step, {group/name: value})` and `close()`. After a resume from an older checkpoint the steps
that are done again replace the old ones in the file and in TensorBoard. In W&B the step is a metric of its own, because
W&B silently ignores a step that goes backwards.

Metrics never end or hold up training: a backend that fails is switched off with one warning (W&B runs in a process of
its own), and rows that the file does not take (a full disk) are missing, of which the first is told.
"""

import atexit
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from serl_config.clock import steady_time
from serl_launcher.run.files import write_text
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.wandb_process import WandbProcess

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Takes numbers; may raise anything."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """One run's metrics. `telemetry.tensorboard`, `telemetry.wandb` and `telemetry.project` of the config decide."""

    def __init__(self, paths: RunPaths, cfg: Mapping[str, Any]) -> None:
        telemetry = cfg.get("telemetry") or {}
        paths.metrics.mkdir(parents=True, exist_ok=True)
        self._path = paths.metrics / "trainer.jsonl"
        self._file: int | None = None
        self._torn = self._missing = False
        self.troubles: dict[str, str] = {}  # backend -> why it is switched off, for people
        self._backends: dict[str, Backend] = {}
        if telemetry.get("tensorboard", True):
            self._backends["tensorboard"] = TensorBoard(paths.metrics / "tensorboard")
        if telemetry.get("wandb", False):
            config = OmegaConf.to_container(OmegaConf.create(dict(cfg)), resolve=True)
            name, project = paths.root.name, telemetry.get("project") or "flowserl"
            self._or_off("wandb", lambda: self._backends.update(
                wandb=WandbProcess(paths.metrics, name, project, config)))  # type: ignore[arg-type]  # fmt: skip
        atexit.register(self.close)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step's metrics: numbers (a tensor of one element will do) and texts such as the stage."""
        row = {key: value if isinstance(value, str) else float(value) for key, value in metrics.items()}
        try:
            self._write_row(step, row)
        except OSError as error:
            if not self._missing:
                _log.warning("%s takes no more rows, from step %d on: %s", self._path, step, error.strerror)
            self._missing = True
        numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
        for name, backend in list(self._backends.items()):
            self._or_off(name, lambda backend=backend: backend.write(step, numbers))

    def close(self) -> None:
        """Flush and close everything; may be called twice, and is called at exit."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        for name, backend in list(self._backends.items()):
            self._or_off(name, backend.close)
        self._backends.clear()
        atexit.unregister(self.close)

    def _or_off(self, name: str, act: Callable[[], object]) -> None:
        """A backend that fails has failed for good: its metrics are in the file."""
        try:
            act()
        except Exception as error:
            self._backends.pop(name, None)
            self.troubles[f"telemetry.{name}"] = f"switched off: {error}"
            _log.warning("telemetry.%s is switched off, training goes on: %s", name, error)
            _log.debug("where it came from", exc_info=True)

    def _write_row(self, step: int, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._open(step)
        assert self._file is not None
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        line = (json.dumps({"step": step, "time": steady_time(), **finite}) + "\n").encode()
        written = os.write(self._file, b"\n" + line if self._torn else line)
        self._torn = written < len(line)
        if self._torn:
            raise OSError(None, "the disk is full")
        self._missing = False

    def _open(self, step: int) -> None:
        """Open the file at the first step that is written, dropping what it is about to repeat."""
        kept = [row for row in read_metrics(self._path) if row["step"] < step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)


class TensorBoard:
    """Event files in `folder`, from the first step that is written on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One step's metrics; those of later steps, of before a resume, are dropped."""
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a trainer.jsonl, ascending in step; an absent file is empty, a torn last line is passed over."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        while rows and rows[-1]["step"] >= row["step"]:  # a kill between a resume and its first purge
            rows.pop()
        rows.append(row)
    return rows
