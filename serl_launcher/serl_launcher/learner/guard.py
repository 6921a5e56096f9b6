"""What the trainer does when training goes wrong: skip, go back, or hold; and when evaluation falls, roll back.

The trainer asks `FaultGuard.after` about each refused step and `EvaluationWatch.look` about each status. Whatever they
answer, the policy server goes on with the last version that was published: a bad step is never published.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serl_launcher.run.parameters import PublishedVersion

SKIP, GO_BACK, HOLD = "skip", "go back", "hold"


class FaultGuard:
    """Counts refused steps: `patience` in a row are skipped (a bad batch), then the last checkpoint is taken; after
    `returns` such returns training holds."""

    def __init__(self, patience: int = 5, returns: int = 3) -> None:
        self._patience, self._returns = patience, returns
        self._in_a_row = self._taken_back = 0

    def good(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def after(self, can_go_back: bool) -> str:
        """What to do after a refused step."""
        self._in_a_row += 1
        if self._in_a_row < self._patience:
            return SKIP
        self._in_a_row = 0
        self._taken_back += 1
        return GO_BACK if can_go_back and self._taken_back <= self._returns else HOLD


@dataclass(slots=True)
class _Best:
    """The best evaluation so far, and which stages were judged; kept in params/kept.json."""

    stage: str = ""
    rate: float = -1.0
    version: int = -1
    judged: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fall:
    """An evaluation that ended too far below the best."""

    stage: str
    rate: float
    best_stage: str
    best_rate: float
    best_version: int
    parameters: Path  # of the best version


class EvaluationWatch:
    """Keeps the parameters of the best evaluated version, and notices a fall.

    goals: episodes of each evaluation stage, in the schedule's order; margin: None judges nothing. A fall is told again
    until `settle` says that its rollback is safe on disk.
    """

    def __init__(self, params_dir: Path, goals: Mapping[str, int], margin: float | None) -> None:
        self._dir, self._goals, self._margin = params_dir, goals, margin
        self._file = params_dir / "kept.json"
        self._best = _Best(**json.loads(self._file.read_text())) if self._file.exists() else _Best()

    def look(self, results: Mapping[str, Mapping[str, int]]) -> Fall | None:
        """results: stage -> {episodes, successes}. A Fall when a stage has just ended below best − margin."""
        if self._margin is None:
            return None
        for stage, goal in self._goals.items():
            row = results.get(stage)
            if row and row["episodes"] >= goal and stage not in self._best.judged:
                return self._judge(stage, row["successes"] / row["episodes"])
        return None

    def _judge(self, stage: str, rate: float) -> Fall | None:
        best, newest = self._best, PublishedVersion.read(self._dir)
        fall = None
        if rate < best.rate - self._margin and self._kept.exists():
            fall = Fall(stage, rate, best.stage, best.rate, best.version, self._kept)
        elif rate >= best.rate and newest is not None:
            part = self._kept.with_suffix(".part")
            shutil.copyfile(self._dir / newest.file, part)
            os.replace(part, self._kept)
            best.stage, best.rate, best.version = stage, rate, newest.version
        if fall is None:
            self.settle(stage)
        return fall

    def settle(self, stage: str) -> None:
        """This stage's evaluation needs nothing more."""
        self._best.judged.append(stage)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self._best)))
        os.replace(part, self._file)

    @property
    def _kept(self) -> Path:
        return self._dir / "kept.safetensors"


def evaluation_goals(stages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Stage -> episodes, of the evaluation stages of `schedule.stages`."""
    return {row["name"]: row["episodes"] for row in stages if row["mode"] == "eval"}
