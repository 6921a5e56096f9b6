"""Where training metrics go: metrics/trainer.jsonl always, TensorBoard and W&B as the config says.

The trainer calls `write(step, {group/name: value})` and `close()`. After a resume from an older checkpoint the steps
that are done again replace the old ones in the file and in TensorBoard; W&B, which takes nothing back, keeps its own.

A backend never ends or holds up training: one that fails is switched off with one warning (W&B runs in a process of its
own, which reads the file). The file is data: while the disk refuses it the trainer waits, and TensorBoard's files catch
up from it.
"""

import atexit
import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from serl_config.clock import steady_time
from serl_launcher.run.files import append_whole, clear, disk_trouble, write_text
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.wandb_process import WandbProcess

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Takes numbers; may raise anything."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """One run's metrics. `telemetry.*` of the config decides."""

    def __init__(self, paths: RunPaths, cfg: Mapping[str, Any]) -> None:
        telemetry = cfg.get("telemetry") or {}
        paths.metrics.mkdir(parents=True, exist_ok=True)
        self._path = paths.metrics / "trainer.jsonl"
        clear(self._path)
        self._file: int | None = None
        self.troubles: dict[str, str] = {}  # backend -> why it is switched off, for people
        self._backends: dict[str, Backend] = {}
        if telemetry.get("tensorboard", True):
            self._backends["tensorboard"] = TensorBoard(paths.metrics / "tensorboard", self._path)
        if telemetry.get("wandb", False):
            config = OmegaConf.to_container(OmegaConf.create(dict(cfg)), resolve=True)
            self._or_off("wandb", lambda: self._backends.update(wandb=WandbProcess(paths.root, config)))  # type: ignore[arg-type]
        atexit.register(self.close)

    def write(self, step: int, metrics: Mapping[str, Any], at: float | None = None) -> None:
        """One step's metrics: numbers (a tensor of one element will do) and texts such as the stage.

        at: unix s of the step, by default now.

        OSError when the disk refuses the file: call it again, nothing is lost or doubled.
        """
        row = {key: value if isinstance(value, str) else float(value) for key, value in metrics.items()}
        if self._file is None:
            self._open(step)
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        append_whole(self._file, (json.dumps({"step": step, "time": at or steady_time(), **finite}) + "\n").encode())
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

    def _open(self, step: int) -> None:
        """Open the file at the first step that is written, dropping what it is about to repeat."""
        kept = [row for row in read_metrics(self._path) if row["step"] < step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)


class TensorBoard:
    """Event files in `folder`, from the first step that is written on; rows: the file that has every row."""

    def __init__(self, folder: Path, rows: Path) -> None:
        self._folder, self._rows = folder, rows
        self._writer: Any = None
        self._behind: int | None = None  # first step that is not here; None: all are

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One step's metrics, and before it those that a full disk refused; of before a resume, later ones go."""
        try:
            if self._writer is None:
                self._writer = self._open(step)
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
            self._behind = None
        except OSError as error:
            if disk_trouble(error) is None:
                raise
            if self._behind is None:
                _log.warning("TensorBoard's files lag behind (%s): %s has every row", error.strerror, self._rows)
                self._behind = step
            self.close()

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard.writer import SummaryWriter

        behind = step if self._behind is None else self._behind
        writer = SummaryWriter(str(self._folder), purge_step=behind)
        for row in read_metrics(self._rows) if behind < step else ():
            for key, value in row.items() if behind <= row["step"] < step else ():
                if key not in ("step", "time") and isinstance(value, int | float):
                    writer.add_scalar(key, value, row["step"], row["time"])
        return writer

    def close(self) -> None:
        """Flush; what a full disk does not take is in the file of rows, too."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a trainer.jsonl, ascending in step; an absent file is empty, a damaged line is passed over."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError):
            continue
        while rows and rows[-1]["step"] >= row["step"]:  # a kill between a resume and its first purge
            rows.pop()
        rows.append(row)
    return rows
