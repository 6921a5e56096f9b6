"""Where everything of a run lies: the layout of runs/<name>/, the only meeting place of the roles.

Every role gets the run folder and finds the rest here. `internal_endpoint` names the gateway's socket for the roles.
"""

import hashlib
import os
from pathlib import Path


class RunPaths:
    """Paths inside one run folder; nothing is created."""

    def __init__(self, root: Path) -> None:
        self.root = root  # runs/<name>
        self.config = root / "config.yaml"  # resolved
        self.journal = root / "journal"  # segments of everything that was acknowledged; the source of truth
        self.episodes = root / "episodes.jsonl"  # the ledger, one line per finished episode (derived)
        self.acceptance = root / "acceptance.jsonl"  # which episodes are imitated, and why (derived)
        self.acts = root / "acts.jsonl"  # what people did to the run: pauses, verdicts, settings (run.acts)
        self.relabelled = root / "relabelled.json"  # what a person said of episodes, by an older release
        self.demos = root / "demos.json"  # where imported demonstrations came from
        self.record = root / "record"  # each start: code, config, libraries, who
        self.starts = self.record / "starts.jsonl"  # one line a start
        self.page = root / "journal.md"  # what happened, for people, who may write into it
        self.dataset = root / "dataset"  # LeRobotDataset v3 (derived)
        self.params = root / "params"  # published parameters
        self.latest_params = self.params / "latest.json"  # pointer to the newest ones
        self.checkpoints = root / "checkpoints"  # the trainer's, manifest written last
        self.metrics = root / "metrics"  # trainer.jsonl and TensorBoard files
        self.videos = root / "videos"  # evaluation and online episodes, mp4
        self.logs = root / "logs"  # one a role
        self.ticket_secret = root / "ticket.secret"  # by which the gateway knows whose an episode is; nobody else's
        self.status = root / "status.json"  # the last status document
        self.stage_progress = root / "stage_progress.json"  # what the trainer last reported of each stage
        self.summary = root / "summary.json"  # figures of a finished run
        self.learning_curve = root / "learning_curve.png"  # its picture

    def spool(self, unique_identifier: str) -> Path:
        """Unacknowledged items of an actor that runs in this folder."""
        return self.root / "spool" / unique_identifier

    def log(self, role: str) -> Path:
        return self.logs / f"{role}.log"

    def starting(self, role: str) -> Path:
        """There from a role's start until it is ready."""
        return self.logs / f"{role}.starting"


def internal_endpoint(run_dir: str | Path) -> str:
    """ipc://… of the gateway's internal socket: short (107 bytes at most), in a folder only this user may enter."""
    # Not tempfile's choice: it passes over a folder whose disk is full, and the roles must agree however they start.
    folder = Path(os.environ.get("TMPDIR") or "/tmp") / f"flowserl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise PermissionError(f"{folder} must belong to uid {os.getuid()} with mode 0700: remove it and start again")
    name = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]
    return f"ipc://{folder}/{name}.sock"
