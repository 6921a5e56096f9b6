"""How far each training stage has come: its steps, its learning rate, and the bound on steps per new transition.

The trainer asks it which stage is due and whether the next step may be taken; a checkpoint holds `counts`.

The bound keeps the trainer from wearing a small replay out. The idea is the rate limiter of Reverb (Cassirer et al.,
2102.04736), with one side only: actors are never held back by the trainer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serl_launcher.learner.learner import Schedule


@dataclass(frozen=True, slots=True)
class StageSettings:
    """Keys of `trainer` in the config."""

    warmup_steps: int  # of the learning rate, at the beginning of each stage
    final_lr_scale: float  # share of the peak at the stage's end
    online_lr_scale: float  # peak of an online stage against the optimizer's lr
    max_steps_per_tick: float  # online steps per transition that entered the replay since the stage began


@dataclass(frozen=True, slots=True)
class TrainingStage:
    """A stage that names steps."""

    name: str
    mode: str  # train or online
    steps: int  # to be taken; the learning rate's cosine spans them


class StageProgress:
    """Steps taken in each stage. Ticks of experience are counted by the gateway over the whole run."""

    def __init__(self, settings: StageSettings) -> None:
        self.settings = settings
        self.steps: dict[str, int] = {}  # stage -> steps taken
        self.began: dict[str, int] = {}  # stage -> ticks of experience when it began
        self._entered: str | None = None

    def due(self, status: Mapping[str, Any]) -> TrainingStage | None:
        """The current stage of a status document; None when it names no steps, or has taken all of them."""
        row = status["stage"]
        if not row.get("steps_goal"):
            return None
        stage = TrainingStage(row["name"], row["mode"], row["steps_goal"])
        return None if self.finished(stage) else stage

    def enter(self, stage: TrainingStage, experience: int) -> bool:
        """True when this stage begins, or is resumed by this process, at so many ticks of experience."""
        begins, self._entered = stage.name != self._entered, stage.name
        self.began.setdefault(stage.name, experience)
        return begins

    def finished(self, stage: TrainingStage) -> bool:
        return self.taken(stage) >= stage.steps

    def taken(self, stage: TrainingStage) -> int:
        return self.steps.get(stage.name, 0)

    def count(self, stage: TrainingStage) -> None:
        self.steps[stage.name] = self.taken(stage) + 1

    def uncount(self, name: str) -> None:
        """A step that was counted turned out to be refused."""
        self.steps[name] -= 1

    def allows(self, stage: TrainingStage, experience: int) -> bool:
        """May the next step be taken at so many ticks of experience? Only an online stage waits for them."""
        return stage.mode != "online" or self.taken(stage) < self.settings.max_steps_per_tick * self._new(
            stage, experience
        )

    def lr_scale(self, stage: TrainingStage) -> float:
        """Factor on the optimizers' learning rates at the next step."""
        peak = self.settings.online_lr_scale if stage.mode == "online" else 1.0
        schedule = Schedule(peak, stage.steps, self.settings.warmup_steps, self.settings.final_lr_scale)
        return schedule.scale(self.taken(stage))

    def metrics(self, stage: TrainingStage, experience: int) -> dict[str, float]:
        if stage.mode != "online":
            return {}
        return {"replay/updates_per_transition": self.taken(stage) / max(1, self._new(stage, experience))}

    def counts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"stage_steps": self.steps, "stage_start": self.began}

    def load(self, counts: Mapping[str, Any]) -> None:
        self.steps, self.began = counts["stage_steps"], counts["stage_start"]

    def _new(self, stage: TrainingStage, experience: int) -> int:
        return experience - self.began.get(stage.name, 0)
