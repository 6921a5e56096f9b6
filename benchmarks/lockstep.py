"""One learning run in one process, actor and trainer in lock step: the same data per step on any machine.

Called by learning.py, steering.py and side_by_side. It is the product's own parts without the sockets between
them: EpisodeRunner with operator and safety chain, step batches through the assembler into the replay ring, the
trainer's view, agent and learner, published parameters into the policy engine. `bash start.sh` runs the same
concurrently; there the number of steps per transition depends on how fast the machine is, here it is `steps_per_tick`.

    demonstrations ─▶ clone ─▶ evaluate ─▶ [ one episode ─▶ steps that are due ] × n ─▶ evaluate
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from flowserl_cli.compose import load_config
from openpi_client.action_chunk_broker import ActionChunkBroker
from serl_launcher.learner.stage import TrainingStage
from serl_launcher.learner.wiring import build_trainer
from serl_launcher.replay.assembler import Assembler
from serl_launcher.replay.entries import DataEntry
from serl_launcher.replay.ring import RingWriter
from serl_launcher.rewards.server import RewardServer
from serl_launcher.rewards.server import build as build_reward_server
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.local import LocalPolicy
from serl_robot_infra.adder import Adder
from serl_robot_infra.episode import ControlStack, EpisodeRunner
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.evaluation import wilson
from serl_robot_infra.link import Run
from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_robot_infra.pacing import Pace, StopSignal
from serl_robot_infra.rewards.base import RewardSource
from serl_robot_infra.rewards.environment import EnvironmentReward
from serl_robot_infra.safety import SafetyChain
from serl_robot_infra.wiring import build_env, build_guard, build_operator, build_reward, demo_noise, plain
from serl_transport.contract.schema import StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire.codec import pack

FIRST_EVAL_SEED, FIRST_CURVE_SEED = 1_000_000, 2_000_000
_NAME = "lockstep"


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of everything a run gets."""

    demos: int = 10  # successful demonstrations
    clone_steps: int = 600  # optimizer steps on them before the online stage
    env_steps: int = 12_000  # control ticks of the online stage; 0: none
    steps_per_tick: float = 0.25  # optimizer steps per online tick
    offline_steps: int = 0  # further optimizer steps on the demonstrations alone
    eval_episodes: int = 60  # of the evaluation before and after, on seeds that training never draws
    curve_every: int = 1500  # ticks between the points of the curve; 0: none
    curve_episodes: int = 30  # of each point, on other seeds than the evaluation's


def budget_of(words: Sequence[str]) -> tuple[Budget, list[str]]:
    """What `budget.<field>=<value>` among the words say, and the other words. SystemExit names an unknown field."""
    own = dict(word.removeprefix("budget.").split("=", 1) for word in words if word.startswith("budget."))
    kinds = {field.name: type(field.default) for field in fields(Budget)}
    if unknown := sorted(set(own) - set(kinds)):
        raise SystemExit(f"no budget.{unknown[0]}; there are {', '.join(kinds)}")
    budget = Budget(**{key: kinds[key](value) for key, value in own.items()})
    return budget, [word for word in words if not word.startswith("budget.")]


def rate(successes: int, trials: int) -> dict[str, Any]:
    """The part of a row that says how well it went."""
    low, high = wilson(successes, trials)
    return {"success_rate": round(successes / trials, 4), "interval": [round(low, 3), round(high, 3)], "trials": trials}


def how_well(reports: Sequence[EpisodeReport]) -> dict[str, Any]:
    """The part of an evaluation's row that says how well, and how fast."""
    good = [report.ticks for report in reports if report.outcome.success]
    return rate(len(good), len(reports)) | {
        "per_1000_ticks": round(1000 * len(good) / sum(report.ticks for report in reports), 2),
        "ticks_to_success": float(np.median(good)) if good else None,
    }


def recent_rate(helped: Sequence[bool]) -> float | None:
    """Share of the last 50 episodes with help; None before there are as many."""
    return round(float(np.mean(helped[-50:])), 3) if len(helped) >= 50 else None


def _clocks() -> np.ndarray:
    """CPU time of this process and wall time, seconds."""
    return np.array([time.process_time(), time.monotonic()])


class Lockstep:
    """Actor side and learner side of one run, joined by function calls."""

    def __init__(self, cfg: DictConfig, budget: Budget) -> None:
        self.cfg, self.budget, self._began = cfg, budget, _clocks()
        self.paths = RunPaths(Path(cfg.runs_dir) / cfg.run)
        for folder in (self.paths.params, self.paths.checkpoints):
            folder.mkdir(parents=True)
        self.spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
        self._assembler = Assembler(self.spec)
        self._ring = RingWriter(self.spec, cfg.replay.capacity_frames, self.paths.root)
        self._sequence = 0
        self.trainer = build_trainer(cfg, self.paths, gateway=None)  # this class decides what comes next
        self.trainer.publisher.publish()
        self.trainer.data.refresh(str(self._ring.path))
        self._policy = LocalPolicy(cfg, self.paths.params)
        self._env = build_env(cfg, self.spec)
        self._rewards = self._serve_classifier()
        self._runner = self._build_runner(build_reward(cfg))
        # What counts in the end is the environment's word, whoever gave the rewards that were learned from.
        stack = replace(self._runner.stack, reward=EnvironmentReward())
        self._evaluation_runner = replace(self._runner, stack=stack)
        self._drawn = {"demo": 0, "online": 0}
        self._helped: list[bool] = []  # of each online episode: did the operator drive?
        self._ticks = {"demo": 0, "online": 0}
        self._operator_ticks = 0  # of online episodes
        self._evaluation_s = np.zeros(2)

    def close(self) -> None:
        """Free the environment and the ring, stop the reward server."""
        if self._rewards is not None:
            self._rewards.server.stop()
        self._env.close()
        self._ring.close()
        self.trainer.step_log.close()

    def _serve_classifier(self) -> RewardServer | None:
        """The reward server that the actor of a run with reward=classifier asks, in a thread, on a free port."""
        if OmegaConf.select(self.cfg, "reward.model") is None:
            return None
        self.cfg.reward.port = 0
        rewards = build_reward_server(self.cfg)
        rewards.server.start(threaded=True)
        self.cfg.reward.port = rewards.server.config.port_number
        return rewards

    def _build_runner(self, reward: RewardSource) -> EpisodeRunner:
        cfg, rollout = self.cfg, self.cfg.rollout
        stack = ControlStack(
            env=self._env,
            broker=ActionChunkBroker(self._policy, rollout.execute_horizon),
            operator=build_operator(cfg, self._env),
            safety=SafetyChain.of(self.spec, plain(cfg.task.get("safety"))),
            reward=reward,
            adder=Adder(self._keep, rollout.batch_ticks),
            pace=Pace(0),
            guard=build_guard(cfg, self._env, EmergencyStop(self.paths.root / "estop")),
        )
        noise = demo_noise(cfg, self._env)
        return EpisodeRunner(
            stack, Observer(), StopSignal(), _NAME, _NAME, rollout.operator, noise, rollout.hold_limit_s
        )

    def _keep(self, body: dict[str, Any]) -> None:
        """A step batch goes where the gateway would put it, validated as there; evaluation is not trained on."""
        batch = StepBatch.from_body(body, self.spec)
        if batch.episode.mode == "eval":
            return
        self._sequence += 1
        entry = DataEntry.of(_NAME, _NAME, self._sequence, pack({"item": body}), self.spec)
        for closed in self._assembler.apply(entry, time.time_ns()):
            episode = closed.build()
            success = bool(episode.outcome.success)
            self._ring.append(closed.ordinal, episode.info.mode, success, episode.arrays, episode.info.prompt)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The whole run: rows `before`, `curve` and `after` as they come. RuntimeError when held."""
        budget = self.budget
        self.demonstrate()
        self.trainer.learner.begin_stage("train")
        self.train("clone", "train", budget.clone_steps, budget.clone_steps)
        yield {"point": "before"} | self.evaluate(budget.eval_episodes, FIRST_EVAL_SEED)
        if budget.offline_steps:
            self.train("offline", "train", budget.offline_steps, budget.offline_steps)
        if budget.env_steps:
            for row in self.online():
                yield {"point": "curve"} | row
        yield {"point": "after"} | self.evaluate(budget.eval_episodes, FIRST_EVAL_SEED)
        if self.trainer.faults.held:
            raise RuntimeError(self.trainer.faults.held)

    def episode(self, mode: str, seed: int, stage: str) -> EpisodeReport:
        """Run one episode with the newest published policy."""
        self._policy.stage()
        newest = self.trainer.publisher.version if mode == "eval" else 0
        ticket = Run(f"{stage}-{seed}", mode, stage, seed, newest, takeover=mode == "online")
        runner = self._evaluation_runner if mode == "eval" else self._runner
        return runner.run(ticket, seed)

    def demonstrate(self) -> None:
        """Until enough of them succeeded."""
        good = 0
        while good < self.budget.demos:
            report = self.episode("demo", self._seed("demo"), "demos")
            self._ticks["demo"] += report.ticks
            good += report.outcome.success

    def train(self, stage: str, mode: str, upto: int, goal: int) -> None:
        """Steps of a stage until it has taken `upto` of its `goal`."""
        trainer, row = self.trainer, TrainingStage(stage, mode, goal)
        trainer.data.refresh(str(self._ring.path))
        if not trainer.data.ready(mode):
            return
        while trainer.stages.taken(row) < upto and trainer.faults.held is None:
            trainer.take_step(row, self._ticks["online"])
        trainer.disk.finish()  # a version that is asked for next has the number after

    def online(self) -> Iterator[dict[str, Any]]:
        """The online stage; points of the curve on the way."""
        budget, goal = self.budget, int(self.budget.env_steps * self.budget.steps_per_tick)
        self.trainer.learner.begin_stage("online")
        due = budget.curve_every or budget.env_steps
        while self._ticks["online"] < budget.env_steps:
            report = self.episode("online", self._seed("online"), "online")
            self._ticks["online"] += report.ticks
            self._helped.append(report.operator_ticks > 0)
            self._operator_ticks += report.operator_ticks
            self.train("online", "online", min(goal, int(self._ticks["online"] * budget.steps_per_tick)), goal)
            if budget.curve_every and self._ticks["online"] >= due:
                due += budget.curve_every
                yield self.evaluate(budget.curve_episodes, FIRST_CURVE_SEED)
        self.trainer.publisher.publish()

    def evaluate(self, trials: int, first_seed: int) -> dict[str, Any]:
        """Success without help, and what has been spent so far."""
        started = _clocks()
        self.trainer.publisher.publish()
        reports = [self.episode("eval", first_seed + k, "evaluation") for k in range(trials)]
        self._evaluation_s += _clocks() - started
        cpu_minutes, wall_minutes = ((_clocks() - self._began - self._evaluation_s) / 60).round(3).tolist()
        return how_well(reports) | {
            "env_steps": self._ticks["online"],
            "demo_steps": self._ticks["demo"],
            "optimizer_steps": self.trainer.learner.step_count,
            "episodes": len(self._helped),  # online ones
            "interventions": sum(self._helped),  # those in which the operator drove
            "human_ticks": self._ticks["demo"] + self._operator_ticks,
            "recent_intervention_rate": recent_rate(self._helped),
            "minutes": cpu_minutes,  # of this process; evaluations are left out
            "wall_minutes": wall_minutes,
        }

    def _seed(self, mode: str) -> int:
        self._drawn[mode] += 1
        return seed_of(self.cfg.seed, mode, self._drawn[mode])


def seed_of(run_seed: int, mode: str, number: int) -> int:
    """Of the `number`-th demonstration or online episode (from 1): below the evaluation's, a stretch for each run."""
    return run_seed * 20_000 + (10_000 if mode == "online" else 0) + number


@contextlib.contextmanager
def opened(words: Sequence[str]) -> Iterator[Lockstep]:
    """A run of these overrides and `budget.<field>=<value>`, in a folder that goes with it."""
    budget, overrides = budget_of(words)
    with tempfile.TemporaryDirectory(prefix="flowserl-lockstep-") as folder:
        fixed = [f"runs_dir={folder}", "run=lockstep", "telemetry.tensorboard=false", "serving.device=cpu"]
        with contextlib.closing(Lockstep(load_config([*overrides, *fixed]), budget)) as lockstep:
            yield lockstep
