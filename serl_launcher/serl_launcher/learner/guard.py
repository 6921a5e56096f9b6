"""Rolls the policy back when an evaluation ends far below the best one. The trainer shows it each status.

status.eval ─▶ EvaluationWatch.look ─▶ a fall ─▶ RollbackGuard: best parameters ─▶ published again ─▶ checkpoint
                     └ a new best: its parameters are kept in params/kept.safetensors
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from serl_launcher.learner.learner import Learner
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.run.alive import busy
from serl_launcher.run.files import read_json, write_json, write_whole
from serl_launcher.run.parameters import PublishedVersion, read_tensors

log = logging.getLogger("trainer")


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far, and which stages were judged; kept in params/kept.json."""

    stage: str = ""
    rate: float = -1.0
    version: int = -1
    judged: list[str] = field(default_factory=list)


class EvaluationWatch:
    """Keeps the parameters of the best evaluated version, and notices a fall.

    goals: episodes of each evaluation stage, in the schedule's order; margin: None judges nothing. A fall is told again
    until `settle` says that its rollback is safe on disk.
    """

    def __init__(self, params_dir: Path, goals: Mapping[str, int], margin: float | None) -> None:
        self._dir, self._goals, self._margin = params_dir, goals, margin
        self._file = params_dir / "kept.json"
        self.kept = params_dir / "kept.safetensors"  # parameters of the best version
        self.best = Best(**(read_json(self._file) or {}))

    def look(self, results: Mapping[str, Mapping[str, int]]) -> tuple[str, float] | None:
        """results: stage -> {episodes, successes}. Stage and rate of one that has just ended below best − margin."""
        if self._margin is None:
            return None
        for stage, goal in self._goals.items():
            row = results.get(stage)
            if row and row["episodes"] >= goal and stage not in self.best.judged:
                return self._judge(stage, row["successes"] / row["episodes"])
        return None

    def _judge(self, stage: str, rate: float) -> tuple[str, float] | None:
        best, newest = self.best, PublishedVersion.read(self._dir)
        if rate < best.rate - self._margin and self.kept.exists():
            return stage, rate
        if rate >= best.rate and newest is not None:
            write_whole(self.kept, partial(shutil.copyfile, self._dir / newest.file))
            self.best = replace(best, stage=stage, rate=rate, version=newest.version)
        self.settle(stage)
        return None

    def settle(self, stage: str) -> None:
        """This stage's evaluation needs nothing more."""
        best = replace(self.best, judged=[*self.best.judged, stage])
        write_json(self._file, asdict(best))
        self.best = best


class RollbackGuard:
    """Acts on what the watch notices."""

    def __init__(
        self, watch: EvaluationWatch, learner: Learner, publisher: Publisher, checkpoints: TrainerCheckpoints
    ) -> None:
        self._watch, self._learner, self._publisher, self._checkpoints = watch, learner, publisher, checkpoints

    @busy(1800.0, "judging an evaluation")
    def check(self, status: Mapping[str, Any]) -> None:
        """Look at the evaluations of a status document; after a fall, bring the best version's parameters back."""
        fall = self._watch.look(status.get("eval") or {})
        if fall is None:
            return
        (stage, rate), best = fall, self._watch.best
        tensors = read_tensors(self._watch.kept)[0]  # perhaps of another algorithm, with parts unknown to this one
        averaged = self._learner.averaged
        self._learner.start_from({name: tensor for name, tensor in tensors.items() if name in averaged})
        self._publisher.publish()
        self._checkpoints.save()  # or the next start would go on from the policy that fell
        self._watch.settle(stage)
        version = self._publisher.version
        log.error(
            "evaluation %s fell to %.2f, more than rollback_margin below the %.2f of %s: version %d is rolled back to "
            "version %d, published again as version %d",
            stage, rate, best.rate, best.stage, version - 1, best.version, version,
        )  # fmt: skip


def evaluation_goals(stages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Stage -> episodes, of the evaluation stages of `schedule.stages`."""
    return {row["name"]: row["episodes"] for row in stages if row["mode"] == "eval"}
