"""What people change in the running training, taken in between two steps. Owned by the trainer, made by learner.wiring.

    acts.jsonl ─▶ look ─┬─▶ words on episodes ─▶ the view is built anew over the ring, by them
                        └─▶ settings ─▶ rule, threshold, periods, rate limiter, goals of evaluations

A restarted trainer reads the same ledger before it builds anything, so both ways lead to the same state.
"""

import logging
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from serl_launcher.learner.data import TrainingData
from serl_launcher.learner.guard import EvaluationWatch, evaluation_goals
from serl_launcher.learner.settings import TrainerSettings
from serl_launcher.learner.stage import StageProgress, StageSettings
from serl_launcher.learner.together import Together
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.in_force import Setting
from serl_launcher.run.live_settings import BUILT, LiveConfig, in_force

log = logging.getLogger("trainer")


class LiveRun:
    """The config with what people changed of it. typed: as config.yaml has it."""

    def __init__(self, ledger: ActsLedger, typed: DictConfig) -> None:
        self._ledger, self._typed = ledger, typed
        self.settings: dict[str, Setting] = {}
        self.config = typed
        self.look()

    def look(self) -> list[str]:
        """Take in what was set since the last call; the keys whose value is another one now."""
        if not self._ledger.refresh() or not (self._ledger.state.settings or self.settings):
            return []
        live: LiveConfig = in_force(OmegaConf.to_container(self._typed, resolve=True), self._ledger.state)
        keys = live.settings.keys() | self.settings.keys()
        changed = [key for key in keys if live.settings.get(key) != self.settings.get(key)]
        self.settings, self.config = live.settings, OmegaConf.create(live.config)
        for key, setting in live.settings.items():
            if key in changed:
                log.warning("%s = %r, set by %s (%s)", key, setting.value, setting.by, setting.time)
        for line in live.passed_over:
            log.warning("%s", line)
        return sorted(changed)

    @property
    def trainer(self) -> TrainerSettings:
        return only(self.config.trainer, TrainerSettings)

    @property
    def stages(self) -> StageSettings:
        return only(self.config.trainer, StageSettings)


def only(settings: DictConfig, kind: type) -> Any:
    """The dataclass `kind` with the values of its fields."""
    return kind(**{field.name: settings[field.name] for field in fields(kind)})


class Operated:
    """Of rank 0, which tells the others."""

    def __init__(
        self,
        run: LiveRun,
        words: Relabelled,
        data: TrainingData,
        stages: StageProgress,
        watch: EvaluationWatch,
        together: Together,
    ) -> None:
        self._run, self._words, self._data, self._stages = run, words, data, stages
        self._watch, self._together = watch, together
        self.settings = run.trainer  # of now

    def look(self) -> None:
        """Take in what people said since the last call; between two steps."""
        keys = self._run.look()
        if keys:
            self._apply(keys)
        if self._words.refresh():
            log.warning("people said something of episodes: what is trained on is chosen anew")
            self._together.start_over(self._words.words)

    def _apply(self, keys: list[str]) -> None:
        config = self._run.config
        if any(key.startswith(BUILT) for key in keys):
            self._together.take_view(config)
        self.settings, self._data.min_accepted = self._run.trainer, config.algo.min_accepted
        self._stages.settings = self._run.stages
        self._watch.take(evaluation_goals(config.schedule.stages), config.trainer.rollback_margin)
