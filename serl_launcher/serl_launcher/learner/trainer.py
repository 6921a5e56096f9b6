"""The trainer role: follows the gateway's schedule, samples the ring, steps the learner, publishes and checkpoints.

Started by the supervisor through `accelerate launch … -m serl_launcher.learner.trainer <run_dir>`.

    gateway status ──▶ stage? ──train──▶ view.refresh ─▶ limiter ─▶ sample ─▶ step ─▶ publish / checkpoint / log
          ▲               └──other──▶ sleep                                                │
          └──────────────────────────── progress (≥ 1/s, and when a stage is done) ────────┘

Blocks on: the gateway's answer (bounded by a timeout, retried), and the limiter (until new transitions arrive).
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from serl_config.mistakes import is_config_mistake, mistake_message
from serl_launcher.agents.build import build_agent, build_policy
from serl_launcher.learner import checkpoint
from serl_launcher.learner.guard import GO_BACK, HOLD, EvaluationWatch, FaultGuard, evaluation_goals
from serl_launcher.learner.learner import Learner, Schedule
from serl_launcher.learner.limiter import StepLimiter
from serl_launcher.policies.trains import parameter_table
from serl_launcher.replay.build import build_view
from serl_launcher.replay.ring import RingError, RingReader
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.parameters import (
    Published,
    base_sha256,
    find_parameters,
    publish,
    read_tensors,
    tensor_names,
)
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.metrics import MetricsWriter
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("trainer")
COMPLAINT_S = 30.0


class Trainer:
    """Rank 0 of the training job: one agent, one view of the replay, one line of progress to the gateway."""

    def __init__(self, cfg: DictConfig, paths: RunPaths, link: InternalClient) -> None:
        self.cfg, self.paths, self.link = cfg, paths, link
        torch.set_num_threads(cfg.trainer.threads)
        torch.manual_seed(cfg.seed)
        self.rng = np.random.default_rng(cfg.seed)
        spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
        accelerator = Accelerator(cpu=cfg.trainer.device == "cpu")
        policy = build_policy(cfg, spec)
        agent = build_agent(cfg, policy, spec).to(accelerator.device)
        self.learner = Learner(
            agent,
            instantiate(cfg.trainer.optimizer, _partial_=True),
            accelerator,
            max_grad_norm=cfg.trainer.max_grad_norm,
            ema_decay=cfg.trainer.ema_decay,
            optimizers={name: instantiate(o, _partial_=True) for name, o in (cfg.algo.get("optimizers") or {}).items()},
        )
        self.view, self.verdicts = build_view(cfg, paths, spec, policy.action_horizon)
        self.limiter = StepLimiter(cfg.trainer.max_steps_per_tick)
        self.policy, self.base = policy, base_sha256(policy)
        log.info("parameters of %s\n%s", cfg.policy.name, parameter_table(policy))
        self.stage_steps: dict[str, int] = {}
        self.stage_start: dict[str, int] = {}  # ticks of experience when a stage began, for the limiter
        self.version = 0  # the first one published is 1
        self.publish_requests = 0  # of operators, that were obeyed
        self.ring_path: str | None = None
        self.guard = FaultGuard()
        self.watch = EvaluationWatch(paths.params, evaluation_goals(cfg.schedule.stages), cfg.trainer.rollback_margin)
        self.held: str | None = None  # why no more steps are taken
        self._next_complaint = 0.0
        self._stopping = False
        self.latest: dict[str, float] = {}  # metrics of the last step, for the dashboard
        self._resume()
        self.metrics = MetricsWriter(paths, cfg)

    def run(self) -> None:
        """Until the gateway says that every stage is done, or `stop`."""
        status = self.link.hello()
        if self.version < 1 or not self._served_is_ours():
            self.publish()
        stage_name = None
        while not self._stopping:
            status = self.report()
            self._roll_back_after_a_fall(status)
            if status.get("done"):
                break
            self._publish_on_request(status)
            stage = status["stage"]
            if not self._trains(stage) or not self._ready(status):
                time.sleep(0.2)
                continue
            if stage["name"] != stage_name:
                stage_name = stage["name"]
                self.learner.begin_stage(stage["mode"])
                log.info("stage %s: %d steps from step %d", stage_name, stage["steps_goal"], self.learner.step_count)
            self._train_for_a_while(stage, status)
        if self._stopping:
            self.save()
            log.info("stopped at step %d, checkpoint written", self.learner.step_count)
        self.metrics.close()
        if base_sha256(self.policy) != self.base:
            raise RuntimeError("frozen parameters changed while training: published versions do not fit their base")

    def stop(self) -> None:
        """End after the step in hand, with a checkpoint; from a signal handler."""
        self._stopping = True

    def _publish_on_request(self, status: dict[str, Any]) -> None:
        """An operator may ask for a version out of turn; a count that falls belongs to a restarted gateway."""
        asked = status.get("operator", {}).get("publish_requests", 0)
        if asked > self.publish_requests:
            log.info("publishing on an operator's request")
            self.publish()
        self.publish_requests = asked

    def _roll_back_after_a_fall(self, status: dict[str, Any]) -> None:
        fall = self.watch.look(status.get("eval") or {})
        if fall is None:
            return
        best = read_tensors(fall.parameters)[0]  # perhaps of another algorithm, with parts that this one does not know
        self.learner.start_from({name: tensor for name, tensor in best.items() if name in self.learner.averaged})
        self.publish()
        self.save()  # or the next start would go on from the policy that fell
        self.watch.settle(fall.stage)
        log.error(
            "evaluation %s fell to %.2f, more than rollback_margin below the %.2f of %s: version %d is rolled back to "
            "version %d, published again as version %d",
            fall.stage, fall.rate, fall.best_rate, fall.best_stage, self.version - 1, fall.best_version, self.version,
        )  # fmt: skip

    def _trains(self, stage: dict[str, Any]) -> bool:
        goal = stage.get("steps_goal")
        if self.held:
            self._complain(self.held)
            return False
        return bool(goal) and self.stage_steps.get(stage["name"], 0) < goal

    def _ready(self, status: dict[str, Any]) -> bool:
        """Is there data to train on: a ring, accepted ticks, and in an online stage enough accepted episodes?"""
        if status.get("ring") and status["ring"] != self.ring_path:
            try:
                self.view.attach(RingReader(status["ring"]))
            except RingError:  # replaced between the status and now; the next status names the new one
                return False
            self.ring_path = status["ring"]
        if self.ring_path is None:
            return False
        self.view.refresh()
        mode = status["stage"]["mode"]
        if problem := self.view.problem(mode, self.cfg.algo.min_accepted):
            self._complain(f"{problem}; policy version {self.version} goes on being served")
        return self.view.ready(mode, self.cfg.algo.min_accepted)

    def _complain(self, problem: str) -> None:
        """Say it now and then again."""
        if time.monotonic() >= self._next_complaint:
            self._next_complaint = time.monotonic() + COMPLAINT_S
            log.warning("%s", problem)

    def _train_for_a_while(self, stage: dict[str, Any], status: dict[str, Any]) -> None:
        """Steps of one stage until it is time to talk to the gateway again (a second), or the stage is done."""
        name, goal, online = stage["name"], stage["steps_goal"], stage["mode"] == "online"
        experience = status["counts"]["experience"]
        began = self.stage_start.setdefault(name, experience)
        deadline = time.monotonic() + 1.0
        while not self._stopping and time.monotonic() < deadline and (done := self.stage_steps.get(name, 0)) < goal:
            if online and not self.limiter.allows(done, experience - began):
                time.sleep(0.1)
                return
            if not self.take_step(name, goal, online, experience - began):
                return

    def take_step(self, stage: str, goal: int, online: bool, new_transitions: int) -> bool:
        """Sample, step, and what is due after it (log, publish, checkpoint); False when the step was refused.

        goal: the stage's steps, of which the learning rate's cosine is made. new_transitions: since the stage began.
        """
        done, settings = self.stage_steps.get(stage, 0), self.cfg.trainer
        peak = settings.online_lr_scale if online else 1.0
        schedule = Schedule(peak=peak, steps=goal, warmup=settings.warmup_steps, final=settings.final_lr_scale)
        started = time.perf_counter()
        batch = self.view.sample(self.rng, settings.batch_size)
        sampled = time.perf_counter()
        try:
            metrics = self.learner.step(batch, schedule.scale(done))
        except FloatingPointError as fault:
            self._recover(fault)
            return False
        self.guard.good()
        self.stage_steps[stage] = done + 1
        metrics["batch/size"] = float(len(batch))
        if online:
            metrics["replay/updates_per_transition"] = (done + 1) / max(1, new_transitions)
        self._after_step(stage, goal, metrics, sampled - started, time.perf_counter() - sampled)
        return True

    def _recover(self, fault: FloatingPointError) -> None:
        """A step was refused: nothing of it is kept, and what is served stays."""
        folders = [f for f in checkpoint.complete(self.paths.checkpoints) if self._wrote(f)]
        decision = self.guard.after(can_go_back=bool(folders))
        log.error("%s (%s; policy version %d goes on being served)", fault, decision, self.version)
        if decision == GO_BACK:
            steps = self.learner.step_count
            self._restore(folders[-1])
            self.learner.step_count = steps  # metrics and versions never go back
            log.error("training goes on from checkpoint %s", folders[-1].name)
        elif decision == HOLD:
            self.held = f"training holds: {fault}"
            self.latest = self.latest | {"trainer/held": 1.0}

    def _after_step(self, stage: str, goal: int, metrics: dict[str, float], sample_s: float, step_s: float) -> None:
        step, cfg = self.learner.step_count, self.cfg.trainer
        metrics = metrics | {
            "time/sample_s": sample_s,
            "time/step_s": step_s,
            **self.view.counts(),
            "policy/version": float(self.version),
        }
        # A loss that is not due every step shows the value of its last turn since the log before.
        self.latest = self.latest | metrics
        if step % cfg.log_period == 0:
            self.metrics.write(step, self.latest | {"stage": stage})
            self.latest = metrics
        finished = self.stage_steps[stage] >= goal
        if finished or step % cfg.publish_period == 0:
            self.publish()
        if finished or step % cfg.checkpoint_period == 0:
            self.save()

    def report(self) -> dict[str, Any]:
        """Tell the gateway where the trainer is; returns the status document."""
        metrics = self.latest | {"replay/accepted": float(self.verdicts.accepted)}
        return self.link.progress(
            step=self.learner.step_count, stage_steps=self.stage_steps, version=self.version, metrics=metrics
        )

    def publish(self) -> None:
        """The averaged parameters as the next policy version."""
        self.version += 1
        publish(
            self.paths.params,
            self.learner.averaged,
            version=self.version,
            step=self.learner.step_count,
            base=self.base,
            policy=self.cfg.policy.name,
            now=time.time(),
            keep=self.cfg.trainer.keep_params,
        )

    def save(self) -> None:
        """A checkpoint of everything that `_resume` reads."""
        state = {
            "counters": self.learner.counters(),
            "stage_steps": self.stage_steps,
            "stage_start": self.stage_start,
            "version": self.version,
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state().tolist(),
            "agent": type(self.learner.agent).__name__,
        }
        optimizer = self.learner.optimizer_state()
        checkpoint.save(
            self.paths.checkpoints,
            self.learner.step_count,
            self.learner.tensors(),
            optimizer,
            state,
            self.cfg.trainer.keep_checkpoints,
        )

    def _served_is_ours(self) -> bool:
        """Has the newest published version the parts that this algorithm's server expects? Another one's may not."""
        newest = Published.read(self.paths.params)
        path = self.paths.params / newest.file if newest else None
        return path is not None and path.exists() and tensor_names(path) == set(self.learner.averaged)

    def _wrote(self, folder: Path) -> bool:
        """Is this checkpoint one of the agent that trains now?"""
        mine = type(self.learner.agent).__name__
        return checkpoint.read_state(folder).get("agent", mine) == mine

    def _restore(self, folder: Path) -> None:
        """Parameters, optimizers and counters of a checkpoint."""
        tensors, optimizer, state = checkpoint.load(folder)
        self.learner.load_tensors(tensors)
        self.learner.load_optimizer_state(optimizer)
        self.learner.load_counters(state["counters"])

    def _resume(self) -> None:
        """From the newest whole checkpoint of this run; else from checkpoint_path; else from scratch."""
        folders = checkpoint.complete(self.paths.checkpoints)
        newest = Published.read(self.paths.params)
        if folders:
            self._continue_from(folders[-1])
            if self.cfg.checkpoint_path:
                log.warning("checkpoint_path is for a new run: this one goes on from %s", folders[-1].name)
        elif self.cfg.checkpoint_path:
            path = find_parameters(self.cfg.checkpoint_path)
            self.learner.start_from(read_tensors(path)[0])
            log.info("starting from %s", path)
        # Versions published after the checkpoint were used by actors: never reuse their numbers.
        self.version = max(self.version, newest.version if newest else 0)

    def _continue_from(self, folder: Path) -> None:
        """The whole state of a checkpoint; of another algorithm's only what both have: the policy and the counters."""
        state = checkpoint.read_state(folder)
        if self._wrote(folder):
            self._restore(folder)
            self.rng.bit_generator.state = state["rng"]
            torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
        else:
            self.learner.continue_from(checkpoint.load(folder)[0])
            self.learner.step_count = state["counters"]["step"]
            log.warning(
                "%s was trained by %s: %s goes on from its policy and the run's data, values and optimizers start anew",
                folder.name, state["agent"], type(self.learner.agent).__name__,
            )  # fmt: skip
        self.stage_steps, self.stage_start, self.version = state["stage_steps"], state["stage_start"], state["version"]
        log.info("resumed from %s at step %d, policy version %d", folder.name, self.learner.step_count, self.version)


def main(run_dir: str) -> int:
    """Entry of the role. Exit 2: a mistake in config or checkpoint, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    paths = RunPaths(Path(run_dir))
    cfg = OmegaConf.load(paths.config)
    with closing(InternalClient(paths.root, "trainer")) as link:
        try:
            trainer = Trainer(cfg, paths, link)
        except (ValueError, FileNotFoundError, InstantiationException) as mistake:
            if not is_config_mistake(mistake):
                raise
            log.debug("where it came from", exc_info=True)
            print(f"trainer: {mistake_message(mistake)}", file=sys.stderr)
            return 2
        signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
        trainer.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
