"""The trainer's loop: follow the schedule, sample, step, publish, checkpoint, report.

A role of its own, started by the supervisor as `python -m serl_launcher.learner <run_dir>`, a process for each rank;
learner.wiring builds it from the run's config.

    gateway status ─▶ stage due? ─▶ data ready? ─▶ limiter ─▶ sample ─▶ step ─▶ log, publish, checkpoint when due
          ▲                 └───────────┴── no: a moment's rest                       │
          └───────────────────── report (≥ 1/s, and when a stage is done) ◀───────────┘

Blocks on: the gateway's answer (bounded by a timeout, retried), the limiter (until new transitions arrive), and a disk
that refuses to be written (learner.disk: no step is taken until what is due is written).
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from serl_launcher.learner.disk import DiskWait, Write
from serl_launcher.learner.faults import SKIP, Faults, Reminder
from serl_launcher.learner.guard import RollbackGuard
from serl_launcher.learner.operated import Operated
from serl_launcher.learner.profile import device_metrics, timed
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.stage import StageProgress, TrainingStage
from serl_launcher.learner.step_log import StepLog
from serl_launcher.learner.together import Together
from serl_launcher.run.alive import Pace, beat, busy
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.ready import say_ready

log = logging.getLogger("trainer")
REPORT_S = 1.0  # at most between two reports to the gateway, plus a step
REST_S = 0.2  # while nothing is to be trained
LIMITED_S = 0.1  # while the limiter waits for transitions
GATEWAY_S = 90.0  # for the gateway's answer: more than its client's patience


class Trainer:
    """Rank 0 of the training job: it decides, and what all ranks do goes through `together`."""

    def __init__(
        self,
        gateway: InternalClient,
        together: Together,
        stages: StageProgress,
        publisher: Publisher,
        checkpoints: TrainerCheckpoints,
        faults: Faults,
        rollback: RollbackGuard,
        step_log: StepLog,
        operated: Operated,
    ) -> None:
        self.gateway, self.together, self.stages = gateway, together, stages
        self.learner, self.data = together.learner, together.data
        self.publisher, self.checkpoints, self.faults, self.rollback = publisher, checkpoints, faults, rollback
        self.step_log, self.operated = step_log, operated
        self._paused: str | None = None  # that an operator holds training, for people
        self.disk = DiskWait(lambda: f", policy version {publisher.version} goes on being served")
        rollback.finish_writes = self.disk.finish
        self._written_steps = dict(stages.steps)  # of each stage, once what was due after them is written
        self._reminder = Reminder()
        self._pace = Pace("a training step")
        self._stopping = False

    def run(self) -> None:
        """Until the gateway says that every stage is done, or `stop`."""
        self.gateway.hello()
        self._bear(lambda: self.disk.write([self._publish_first]))
        over = None
        while not self._stopping and not over:
            beat()
            over = self._bear(partial(self.turn, self.report()))
        self.end()

    def _publish_first(self) -> None:
        if not self.publisher.newest_can_be_served():
            self.publisher.publish()

    def _bear(self, act: Callable[[], bool | None]) -> bool | None:
        """Act and return what it returns; where the disk refuses a write, wait a moment: None."""
        try:
            result = act()
        except OSError as error:
            self.disk.refused(error)
            return None
        self.disk.taken()
        return result

    def turn(self, status: dict[str, Any]) -> bool:
        """What is to be done by this status; True when that is nothing more. OSError when the disk refuses a write."""
        self.together.rest()
        self.disk.catch_up()
        self.operated.look()
        self.rollback.check(status)
        paused_by = (status.get("operator") or {}).get("training_paused")
        self._paused = f"{paused_by} paused the training; training_resume lets it go on" if paused_by else None
        if status.get("done"):
            return True
        self.publisher.publish_on_request(status, self.disk.finish)
        stage = self.stages.due(status)
        if stage is not None and self.may_train(stage, status):
            self.train(stage, status["counts"]["experience"])
        else:
            time.sleep(REST_S)
        say_ready()  # after its first steps, where steps are due: a trainer that dies of them was never up
        return False

    def train(self, stage: TrainingStage, experience: int) -> None:
        """Steps of a stage until the gateway must hear of it, or no step may be taken now.

        experience: ticks that the gateway has counted over the run.
        """
        if self.stages.enter(stage, experience):
            self.together.begin_stage(stage.mode)
            self._pace = Pace("a training step")  # the first one of another stage may compile
            log.info("stage %s: %d steps from step %d", stage.name, stage.steps, self.learner.step_count)
        report_at = time.monotonic() + REPORT_S
        while not self._stopping and time.monotonic() < report_at and not self.stages.finished(stage):
            if not self.stages.allows(stage, experience):
                time.sleep(LIMITED_S)
                return
            self.disk.catch_up()
            if not self.take_step(stage, experience):
                return
        if self.stages.finished(stage):
            self.disk.finish()

    def take_step(self, stage: TrainingStage, experience: int) -> bool:
        """Sample, step, and what is due after it (log, publish, checkpoint); False when it is known to be refused.

        OSError when the disk refuses: the step is taken, what is due stays due.
        """
        with self._pace.timed():
            size, metrics = self.together.step(self.operated.settings.batch_size, self.stages.lr_scale(stage))
        self.stages.count(stage)
        times = {"time/stall_s": self.disk.stall_s}  # of the last version and checkpoint
        logged = self.log_step(stage, experience, metrics | {"batch/size": float(size)} | times)
        settings = self.operated.settings
        publishes, saves = (self._due(stage, n) for n in (settings.publish_period, settings.checkpoint_period))
        if not (logged or publishes or saves):
            return True
        with timed("read metrics"):
            sound = self.settle()
        try:
            if sound and (publishes or saves):
                with timed("publish and save"):
                    self.disk.begin(self._writes(stage, publishes, saves))
        finally:
            with timed("log"):
                self.disk.write([self.step_log.write])
        return sound

    def _writes(self, stage: TrainingStage, publishes: bool, saves: bool) -> list[Write]:
        """What is due after a step; until it is written, that step does not count."""
        before = self.stages.steps | {stage.name: self.stages.taken(stage) - 1}
        version = Write("version", self.publisher.copy, self.publisher.publish, before)
        checkpoint = Write("checkpoint", self.checkpoints.copy, self.checkpoints.save, before)
        return [version] * publishes + [checkpoint] * saves

    def settle(self) -> bool:
        """Learn which of the last steps the device refused, and act on it; was the newest one taken?

        Before anything is published or saved: what is counted in a checkpoint was taken.
        """
        with self._pace.timed():
            rows = self.step_log.read()
        found = [(row.stage, self.learner.fault(row.step, row.metrics)) for row in rows]
        if any(fault for _, fault in found):
            self.disk.still()  # the last checkpoint may be on its way
        for stage, fault in found:
            if fault is not None:
                self.stages.uncount(stage)
        for _, fault in found:
            if fault is None:
                self.faults.taken()
            elif self.faults.refused(fault) != SKIP:
                return False  # the steps behind it are of what was given up
        return not found or found[-1][1] is None

    def may_train(self, stage: TrainingStage, status: dict[str, Any]) -> bool:
        """Is there data to train this stage on, and nothing that holds training? Says what is in the way."""
        if held := self._paused or self.faults.held:
            self._reminder.say(held)
            return False
        with busy(600.0, "judging the episodes of the ring"):
            refreshed = self.together.refresh(status.get("ring"))
        if not refreshed:
            return False
        if problem := self.data.problem(stage.mode):
            self._reminder.say(f"{problem}; policy version {self.publisher.version} goes on being served")
        return self.data.ready(stage.mode)

    def log_step(self, stage: TrainingStage, experience: int, metrics: dict[str, Any]) -> bool:
        """Note the step's metrics and those of everything around it; is it a logged step?"""
        metrics |= self.stages.metrics(stage, experience) | self.data.metrics()
        metrics["policy/version"] = float(self.publisher.version)
        if self.step_log.due(self.learner.step_count):
            metrics |= device_metrics(self.learner.device)
        return self.step_log.add(self.learner.step_count, stage.name, metrics)

    @busy(GATEWAY_S, "waiting for the gateway")
    def report(self) -> dict[str, Any]:
        """Tell the gateway where the trainer is; returns the status document.

        Steps count once what was due after them is written: a stage must not end before its last version is published.
        """
        self._written_steps = self.disk.counted(self.stages.steps, self._written_steps)
        accepted = {"replay/accepted": float(self.data.accepted)}
        return self.gateway.progress(
            step=self.learner.step_count,
            stage_steps=self._written_steps,
            version=self.publisher.version,
            metrics=self.step_log.shown | self.faults.metrics() | accepted,
            troubles=self.step_log.troubles,
            waits=self.disk.waits or self._paused,
            obeyed=self.publisher.obeyed,
        )

    def stop(self) -> None:
        """End after the step in hand, with a checkpoint; from a signal handler."""
        self._stopping = True

    @busy(1800.0, "ending")
    def end(self) -> None:
        """What a trainer leaves behind. RuntimeError when frozen parameters have changed."""
        say_ready()
        self._write_last()
        self.disk.close()
        self.step_log.close()
        self.together.end()
        self.publisher.check_frozen()

    def _write_last(self) -> None:
        """What was begun, and where it is stopped a checkpoint. A disk that refuses is not waited for: the next start
        takes the one before."""
        if self._stopping:
            self.settle()
        try:
            self.disk.finish()
            if self._stopping:
                self.disk.write([self.checkpoints.save])
                log.info("stopped at step %d, checkpoint written", self.learner.step_count)
        except OSError as error:
            last = self.checkpoints.last_own()
            log.error(
                "stopped at step %d without a checkpoint (%s): the next start goes on from %s",
                self.learner.step_count, error.strerror, last.name if last else "the beginning",
            )  # fmt: skip

    def _due(self, stage: TrainingStage, period: int) -> bool:
        return self.stages.finished(stage) or self.learner.step_count % period == 0
