"""What the trainer has reported, kept in stage_progress.json so that the stage survives a gateway without a trainer.

The file is written while the gateway's loop goes on, and does not wait for the disk. What a power cut or damage took
from it, the newest checkpoint knows.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serl_launcher.run import checkpoints
from serl_launcher.run.files import DamagedFileError, read_sealed, write_sealed
from serl_launcher.run.schedule import Stage
from serl_transport.contract.errors import BadFrame

log = logging.getLogger("gateway")
ALIVE_S = 5.0  # a trainer reports once a second


class TrainerProgress:
    """Steps per stage never go back, unless the trainer has said hello (it resumed from a checkpoint).

    checkpoints_dir: the trainer's, for what `path` has lost.
    """

    def __init__(self, path: Path, checkpoints_dir: Path, stages: Sequence[Stage]) -> None:
        self._path = path
        self._goals = {stage.name: stage.steps for stage in stages if stage.steps}
        kept = _kept(path)
        self.step: int = kept.get("step", 0)
        self.version: int = kept.get("version", -1)
        self.stage_steps: dict[str, int] = kept.get("stage_steps", {})
        self.end_versions: dict[str, int] = kept.get("end_versions", {})  # stage -> version when its steps were done
        self._take_checkpoint(checkpoints_dir)
        self.metrics: dict[str, float] = {}
        self.troubles: dict[str, str] = {}  # what the trainer goes on without, by name, for people
        self.waits: str | None = None  # for what, as the trainer says
        self._last = -float("inf")
        self._resumed = False

    def hello(self) -> None:
        """A trainer process started: its first report is the truth, even when it is behind."""
        self._resumed = True

    def report(self, body: Mapping[str, Any]) -> None:
        """Take one `progress` message. BadFrame names what is wrong with it."""
        step, version = body.get("step"), body.get("version")
        steps, metrics = body.get("stage_steps"), body.get("metrics", {})
        if not isinstance(step, int) or not isinstance(version, int):
            raise BadFrame(f"progress: expected step and version: int, got {step!r} and {version!r}")
        if not isinstance(steps, dict) or not all(isinstance(n, int) for n in steps.values()):
            raise BadFrame(f"progress: expected stage_steps: {{stage: int}}, got {steps!r}")
        if not isinstance(metrics, dict):
            raise BadFrame(f"progress: expected metrics: {{name: number}}, got {metrics!r}")
        troubles = body.get("troubles", {})
        if not isinstance(troubles, dict) or not all(isinstance(text, str) for text in troubles.values()):
            raise BadFrame(f"progress: expected troubles: {{name: text}}, got {troubles!r}")
        self.troubles = troubles
        waits = body.get("waits")
        if waits is not None and not isinstance(waits, str):
            raise BadFrame(f"progress: expected waits: text or null, got {waits!r}")
        self.waits = waits
        before = (self.step, self.version, dict(self.stage_steps), dict(self.end_versions))
        if self._resumed:
            self.stage_steps, self._resumed = dict(steps), False
        else:
            for stage, n in steps.items():
                self.stage_steps[stage] = max(n, self.stage_steps.get(stage, 0))
        self.step, self.version, self.metrics, self._last = step, version, metrics, time.monotonic()
        self._note_ends()
        if before != (self.step, self.version, self.stage_steps, self.end_versions):
            self._keep()

    @property
    def is_alive(self) -> bool:
        """Has the trainer reported lately?"""
        return time.monotonic() - self._last < ALIVE_S

    def take_goals(self, stages: Sequence[Stage]) -> None:
        """The stages as people changed them."""
        self._goals = {stage.name: stage.steps for stage in stages if stage.steps}
        self._note_ends()

    def to_status(self) -> dict[str, Any]:
        """The `trainer` part of the status document."""
        alive = self.is_alive
        waits = self.waits if alive else None
        return {"step": self.step, "version": self.version, "metrics": self.metrics, "alive": alive, "waits": waits}

    def _take_checkpoint(self, root: Path) -> None:
        """The newest checkpoint, where it is ahead."""
        newest = next(checkpoints.whole(root, [checkpoints.STATE]), None)
        state = checkpoints.read_state(newest) if newest else {}
        for stage, n in state.get("stage_steps", {}).items():
            self.stage_steps[stage] = max(n, self.stage_steps.get(stage, 0))
        self.step = max(self.step, state.get("counters", {}).get("step", 0))
        self.version = max(self.version, state.get("version", -1))
        self._note_ends()

    def _note_ends(self) -> None:
        for stage, goal in self._goals.items():
            over = self.stage_steps.get(stage, 0) >= goal
            if over:
                self.end_versions.setdefault(stage, self.version)
            else:
                self.end_versions.pop(stage, None)

    def _keep(self) -> None:
        body = {
            "step": self.step,
            "version": self.version,
            "stage_steps": self.stage_steps,
            "end_versions": self.end_versions,
        }
        try:
            write_sealed(self._path, body, durable=False)
        except OSError as error:
            log.warning("cannot write %s (%s): a restarted gateway will ask the trainer", self._path, error.strerror)


def _kept(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path, ["step", "version", "stage_steps", "end_versions"]) or {}
    except DamagedFileError as damage:
        log.warning("%s; the stages' steps are taken from the newest checkpoint, then from the trainer", damage)
        return {}
