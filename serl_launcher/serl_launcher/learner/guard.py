"""Rolls the policy back when an evaluation ends far below the best one. The trainer shows it each status.

status.eval ─▶ EvaluationWatch.look ─▶ a fall ─▶ RollbackGuard: best parameters ─▶ published again ─▶ checkpoint
                     └ a new best: its version stays in params/ however many follow

params/kept.json says which it is. Damaged, it is made again from the evaluations, which say what version acted.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.together import Together
from serl_launcher.run.alive import busy
from serl_launcher.run.files import DamagedFileError, read_sealed, write_sealed
from serl_launcher.run.parameters import PublishedVersion, read_tensors
from serl_launcher.run.versions import KEPT, check_file, file_path

log = logging.getLogger("trainer")


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far, and which stages were judged; kept in params/kept.json."""

    stage: str = ""
    rate: float = -1.0
    version: int = -1
    judged: list[str] = field(default_factory=list)


class EvaluationWatch:
    """Knows the best evaluated version, and notices a fall.

    goals: episodes of each evaluation stage, in the schedule's order; margin: None judges nothing. A fall is told again
    until `settle` says that its rollback is safe on disk.
    """

    def __init__(self, params_dir: Path, goals: Mapping[str, int], margin: float | None) -> None:
        self._dir, self._goals, self._margin = params_dir, goals, margin
        self._file = params_dir / KEPT
        self._rebuilds = False  # what is over was judged before: only the best of it is wanted
        try:
            keys = [field.name for field in fields(Best)]
            self.best = Best(**(read_sealed(self._file, keys, keys) or {}))
        except DamagedFileError as damage:
            log.warning("%s; the best version is found again from the evaluations", damage)
            self.best, self._rebuilds = Best(), True

    def look(self, results: Mapping[str, Mapping[str, int]]) -> tuple[str, float] | None:
        """results: stage -> {episodes, successes, version}. Stage and rate of one that has just ended too low."""
        if self._margin is None:
            return None
        for stage, goal in self._goals.items():
            row = results.get(stage)
            if row and row["episodes"] >= goal and stage not in self.best.judged:
                fall = self._judge(stage, row["successes"] / row["episodes"], row.get("version"))
                if fall and not self._rebuilds:
                    return fall
        self._rebuilds = False
        return None

    def take(self, goals: Mapping[str, int], margin: float | None) -> None:
        """What an operator changed of these."""
        self._goals, self._margin = goals, margin

    def pass_over(self, results: Mapping[str, Mapping[str, int]]) -> None:
        """Evaluations of a version that a person pinned say nothing of the training: what is over is not judged."""
        if self._margin is None:
            return
        for stage, goal in self._goals.items():
            row = results.get(stage)
            if row and row["episodes"] >= goal and stage not in self.best.judged:
                log.info(
                    "evaluation %s was of version %s, which is pinned: it is not judged", stage, row.get("version")
                )
                self.settle(stage)

    @property
    def kept(self) -> Path | None:
        """Parameters of the best version, compared with their checksum; None where they are gone or damaged."""
        path, former = file_path(self._dir, self.best.version), self._dir / "kept.safetensors"
        try:
            check_file(path)
            if path.exists():
                return path
            # A copy, as older releases made it.
            if former.exists() and read_tensors(former)[1].get("version") == str(self.best.version):
                return former
        except DamagedFileError as damage:
            log.error("%s: the best version, %d, cannot be brought back", damage, self.best.version)
        return None

    def _judge(self, stage: str, rate: float, version: int | None) -> tuple[str, float] | None:
        best, newest = self.best, PublishedVersion.read(self._dir)
        if rate < best.rate - self._margin and not self._rebuilds and self.kept is not None:
            return stage, rate
        if version is None:
            version = newest.version if newest else -1
        if rate >= best.rate and file_path(self._dir, version).exists():
            best = replace(best, stage=stage, rate=rate, version=version)
        elif rate >= best.rate:
            log.warning("evaluation %s: version %d is on disk no longer and cannot be brought back", stage, version)
        self._note(best, stage)
        return None

    def settle(self, stage: str) -> None:
        """This stage's evaluation needs nothing more."""
        self._note(self.best, stage)

    def _note(self, best: Best, judged: str) -> None:
        """OSError when the disk refuses: nothing was judged then."""
        best = replace(best, judged=[*best.judged, judged])
        write_sealed(self._file, asdict(best))
        self.best = best


class RollbackGuard:
    """Acts on what the watch notices."""

    def __init__(
        self, watch: EvaluationWatch, together: Together, publisher: Publisher, checkpoints: TrainerCheckpoints
    ) -> None:
        self._watch, self._together, self._publisher, self._checkpoints = watch, together, publisher, checkpoints
        self.finish_writes: Callable[[], None] = lambda: None  # of what the trainer has begun to write
        self._published: str | None = None  # stage whose rollback is published; a full disk may refuse its checkpoint

    @busy(1800.0, "judging an evaluation")
    def check(self, status: Mapping[str, Any]) -> None:
        """Look at the evaluations of a status document; after a fall, bring the best version's parameters back."""
        results = status.get("eval") or {}
        if (status.get("operator") or {}).get("served") is not None:
            self._watch.pass_over(results)
        fall = self._watch.look(results)
        kept = self._watch.kept if fall else None
        if fall is None or kept is None:
            return
        self.finish_writes()
        (stage, rate), best = fall, self._watch.best
        if self._published != stage:
            self._together.start_from(kept)
            self._publisher.publish()
            self._published = stage
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
