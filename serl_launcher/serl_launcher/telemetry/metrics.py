"""Where training metrics go: metrics/trainer.jsonl always, TensorBoard and W&B as the config says.

The trainer calls `write(step, {group/name: value})` and `close()`. After a resume from an older checkpoint the steps
that are done again replace the old ones in the file and in TensorBoard. In W&B the step is a metric of its own, because
W&B silently ignores a step that goes backwards.
"""

import atexit
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from serl_launcher.run.files import clear, write_text
from serl_launcher.run.paths import RunPaths

_log = logging.getLogger(__name__)


class MetricsWriter:
    """One run's metrics. `telemetry.tensorboard`, `telemetry.wandb` and `telemetry.project` of the config decide."""

    def __init__(self, paths: RunPaths, cfg: Mapping[str, Any]) -> None:
        telemetry = cfg.get("telemetry") or {}
        paths.metrics.mkdir(parents=True, exist_ok=True)
        self._path = paths.metrics / "trainer.jsonl"
        clear(self._path)
        self._tensorboard_dir = paths.metrics / "tensorboard" if telemetry.get("tensorboard", True) else None
        self._tensorboard: Any = None
        self._wandb = _start_wandb(paths, cfg) if telemetry.get("wandb", False) else None
        self._file: int | None = None
        atexit.register(self.close)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step's metrics: numbers (a tensor of one element will do) and texts such as the stage."""
        row = {key: value if isinstance(value, str) else float(value) for key, value in metrics.items()}
        if self._file is None:
            self._open(step)
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        os.write(self._file, (json.dumps({"step": step, "time": time.time(), **finite}) + "\n").encode())
        numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({"trainer/step": step, **numbers})

    def close(self) -> None:
        """Flush and close everything; may be called twice, and is called at exit."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        atexit.unregister(self.close)

    def _open(self, step: int) -> None:
        """Open the file and TensorBoard at the first step that is written, dropping what it is about to repeat."""
        kept = [row for row in read_metrics(self._path) if row["step"] < step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        if self._tensorboard_dir is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._tensorboard_dir), purge_step=step)


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


def _start_wandb(paths: RunPaths, cfg: Mapping[str, Any]) -> Any:
    """A W&B run that resumes under the same id; offline unless a key (or WANDB_MODE) says otherwise.

    A W&B that cannot start costs its own metrics only: training goes on, and the log says why.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    id_path = paths.metrics / "wandb_run_id"
    if not id_path.exists():
        write_text(id_path, uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=(cfg.get("telemetry") or {}).get("project") or "flowserl",
            name=paths.root.name,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(paths.metrics),
            mode=mode,  # type: ignore[arg-type]
            config=OmegaConf.to_container(OmegaConf.create(cfg), resolve=True),
            settings=wandb.Settings(console="off"),
        )
    except (wandb.Error, OSError) as error:
        _log.warning("telemetry.wandb: W&B did not start (%s); its metrics are in %s only", error, paths.metrics)
        return None
    run.define_metric("trainer/step")
    run.define_metric("*", step_metric="trainer/step")
    if mode == "offline":
        _log.info("W&B is offline (no WANDB_API_KEY): `wandb sync %s/wandb/offline-run-*` uploads it", paths.metrics)
    return run
