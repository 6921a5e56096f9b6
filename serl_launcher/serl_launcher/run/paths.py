"""Where everything of a run lies: the layout of runs/<name>/, the only meeting place of the roles.

Every role gets the run folder and finds the rest here. `internal_endpoint` names the gateway's socket for the roles.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Paths inside one run folder; nothing is created."""

    root: Path  # runs/<name>

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.yaml"

    @property
    def journal(self) -> Path:
        """Segments of everything that was acknowledged; the source of truth."""
        return self.root / "journal"

    @property
    def episodes(self) -> Path:
        """The ledger, one line per finished episode (derived)."""
        return self.root / "episodes.jsonl"

    @property
    def acceptance(self) -> Path:
        """Which episodes are imitated, and why, one line per verdict (derived)."""
        return self.root / "acceptance.jsonl"

    @property
    def relabelled(self) -> Path:
        """What a person said of episodes afterwards."""
        return self.root / "relabelled.json"

    @property
    def dataset(self) -> Path:
        """LeRobotDataset v3 (derived)."""
        return self.root / "dataset"

    @property
    def params(self) -> Path:
        """Published parameters and latest.json."""
        return self.root / "params"

    @property
    def latest_params(self) -> Path:
        """Pointer to the newest published parameters."""
        return self.params / "latest.json"

    @property
    def checkpoints(self) -> Path:
        """Trainer checkpoints, manifest written last."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """trainer.jsonl and TensorBoard files."""
        return self.root / "metrics"

    @property
    def videos(self) -> Path:
        """Evaluation and online episodes, mp4."""
        return self.root / "videos"

    @property
    def logs(self) -> Path:
        """One log per role."""
        return self.root / "logs"

    @property
    def status(self) -> Path:
        """The last status document."""
        return self.root / "status.json"

    @property
    def stage_progress(self) -> Path:
        """What the trainer last reported of each stage, kept by the gateway."""
        return self.root / "stage_progress.json"

    @property
    def summary(self) -> Path:
        """Figures of a finished run."""
        return self.root / "summary.json"

    @property
    def learning_curve(self) -> Path:
        """Its picture."""
        return self.root / "learning_curve.png"

    def spool(self, unique_identifier: str) -> Path:
        """Unacknowledged items of an actor that runs in this folder."""
        return self.root / "spool" / unique_identifier

    def log(self, role: str) -> Path:
        """Log of one role."""
        return self.logs / f"{role}.log"

    def starting(self, role: str) -> Path:
        """There from a role's start until it is ready."""
        return self.logs / f"{role}.starting"


def internal_endpoint(run_dir: str | Path) -> str:
    """ipc://… of the gateway's internal socket: short (107 bytes at most), in a folder only this user may enter."""
    folder = Path(tempfile.gettempdir()) / f"flowserl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise PermissionError(f"{folder} must belong to uid {os.getuid()} with mode 0700: remove it and start again")
    name = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]
    return f"ipc://{folder}/{name}.sock"
