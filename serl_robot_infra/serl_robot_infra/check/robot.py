"""The check of a robot before a session, question after question. Called by tools/check_robot.py.

    config ─▶ env ─▶ [loop for some seconds: cameras, rate, limits] ─▶ learner ─▶ policy ─▶ operator ─▶ stops ─▶ report

Each part is made by the actor's own functions. A part that cannot be made is a finding, and the others are still asked.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from serl_config.mistakes import mistake_message
from serl_robot_infra.check.keys import check_estop_key, check_operator
from serl_robot_infra.check.learner import check_latency, find_learner
from serl_robot_infra.check.limits import check_limits
from serl_robot_infra.check.looking import CameraWatch, NotMovedError, Observed, looker, watch
from serl_robot_infra.check.pictures import check_pictures, check_places, save_pictures
from serl_robot_infra.check.recorded import Recorded, read_episode
from serl_robot_infra.check.rehearsal import dry_run, move_along, report_passed, through_chain
from serl_robot_infra.check.report import Report
from serl_robot_infra.check.stopping import check_latch, check_stops
from serl_robot_infra.envs.base import Environment, PartLostError
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard, Stoppable
from serl_robot_infra.operators import control_rate
from serl_robot_infra.safety import SafetyChain
from serl_robot_infra.standalone import StandaloneLink
from serl_robot_infra.wiring import build_env, build_guard, build_policy, plain
from serl_transport.client import TrainerClient
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

_LATE = 0.05  # share of ticks that may take longer than a period
_QUESTIONS = 5  # of a dry run


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for beside the config."""

    move: bool = False  # the robot may be reset and stepped
    attended: bool = False  # somebody is there to press keys
    remember: bool = False  # take the new pictures as the right ones
    dry_run: bool = False  # ask the policy, send nothing
    seconds: float = 5.0  # of the loop
    replay: str | None = None  # a run or dataset
    episode: int = 0


def check(cfg: DictConfig, options: Options, stream: TextIO | None = None) -> Report:
    """Ask everything; the report is also in `<runs_dir>/<run>/check/`.

    Raises ValueError where the words cannot be used (a task, a recording), OSError where the report cannot be written.
    """
    began, run = time.monotonic(), Path(cfg.runs_dir) / cfg.run
    spec = TaskSpec.from_dict(plain(cfg.task.spec))
    episode = read_episode(options.replay, options.episode, spec) if options.replay else None
    folder = run / "check"
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(stream or sys.stdout)
    print(f"check of {spec.name}: {'it may move' if options.move else 'nothing moves'}", file=report.stream, flush=True)
    check_latch(report, run)
    with ExitStack() as resources:
        link = find_learner(report, cfg, spec, report.stream) if cfg.ip else None
        if link is not None:
            resources.callback(link.stop)
        env = _make_env(report, cfg, spec)
        if env is not None:
            resources.callback(env.close)
            _Check(report, cfg, options, env, link, folder).run(episode)
        elif link is not None:
            check_latency(report, cfg, spec, link, None)
    took = time.monotonic() - began
    report.figures["the whole check, s"] = took
    report.write(folder / "report.json", {"task": spec.name, "run": str(cfg.run), "moved": options.move})
    print(f"{report.verdict()} after {took:.0f} s; report.json and pictures: {folder}", file=report.stream, flush=True)
    return report


def _make_env(report: Report, cfg: DictConfig, spec: TaskSpec) -> Environment | None:
    try:
        env = build_env(cfg, spec)
    except (InstantiationException, ValueError, OSError, ImportError) as problem:
        said = mistake_message(problem) if isinstance(problem, InstantiationException) else str(problem)
        report.fail("robot", said, "task.env in its yaml, its cables and supply, another process that holds it")
        return None
    report.ok("robot", f"{type(env).__name__}, {'a robot' if isinstance(env, Stoppable) else 'a simulation'}")
    return env


@dataclass(frozen=True, slots=True)
class _Check:
    """What is asked of an environment that is there."""

    report: Report
    cfg: DictConfig
    options: Options
    env: Environment
    link: TrainerClient | None
    folder: Path

    def run(self, episode: Recorded | None) -> None:
        """All of it; the stops last, after which the driver ignores actions."""
        report, cfg, env, options = self.report, self.cfg, self.env, self.options
        safety = plain(cfg.task.get("safety"))
        with ExitStack() as resources:
            estop = EmergencyStop(Path(cfg.runs_dir) / cfg.run / "estop")
            resources.callback(estop.close)
            try:
                guard = build_guard(cfg, env, estop)
            except ValueError as problem:
                report.fail("watchdog", str(problem), "rollout.watchdog; the class's stopper. Nothing else was asked")
                return
            resources.callback(guard.close)
            resources.enter_context(guard.installed())
            observed = self._look(guard)
            seen = observed.last if observed and observed.states else None
            with self._driver("limits"):
                check_limits(report, env, safety, seen.state if seen else None)
            if self.link is not None:
                check_latency(report, cfg, env.spec, self.link, seen)
            if options.dry_run:
                self._dry_run(seen)
            if episode is not None:
                self._replay(episode, guard)
            check_operator(report, cfg, env, seen, options.attended, report.stream)
        self._stops()

    def _look(self, guard: RobotGuard) -> Observed | None:
        report, cfg, env = self.report, self.cfg, self.env
        safety, rate = plain(cfg.task.get("safety")), self._rate
        observed = Observed(rate, {name: CameraWatch() for name in env.spec.cameras})
        try:
            with self._driver("loop"):
                look = looker(env, guard, safety, self.options.move)
                watch(look, env.spec, rate, self.options.seconds, observed)
        except NotMovedError as reason:
            report.warn("cameras, rate", f"not looked at: {reason}", "as it says")
            return None
        finally:
            guard.rest(stop=False)
        if not observed.states:
            return None
        pictures = save_pictures(observed, self.folder)
        check_pictures(report, observed, isinstance(env, Stoppable))
        if pictures:
            known = Path(cfg.runs_dir) / ".check_robot" / env.spec.name
            check_places(report, observed, known, self.folder, self.options.remember)
        self._check_rate(observed)
        return observed

    @property
    def _rate(self) -> float:
        """Of the real loop: a simulation that may run faster is asked for real time."""
        rate = control_rate(self.cfg, self.env.spec) or self.env.spec.control_hz
        return min(rate, self.env.spec.control_hz)

    def _check_rate(self, observed: Observed) -> None:
        report, period = self.report, 1.0 / observed.rate_hz
        median, worst = float(np.median(observed.took_s)) * 1e3, max(observed.took_s) * 1e3
        late = float(np.mean(np.array(observed.took_s) > period))
        report.figures |= {"loop, Hz": observed.reached_hz, "loop, median ms": median, "loop, worst ms": worst}
        still = isinstance(self.env, Stoppable) and not self.options.move
        what = "observe() alone (--move measures step())" if still else "step()"
        says = (
            f"{observed.reached_hz:.1f} of {observed.rate_hz:g} Hz; {what}: median {median:.1f} ms, "
            f"worst {worst:.1f} ms of {period * 1e3:.0f} ms"
        )
        if median > period * 1e3:
            fix = "a faster camera or bus, smaller pictures; or a lower task.spec.control_hz on both hosts"
            report.fail("control rate", says, fix)
        elif late > _LATE:
            report.warn("control rate", f"{says}; {late:.0%} late", "what else runs on this host; USB hubs")
        else:
            report.ok("control rate", says)

    def _dry_run(self, seen: Observation | None) -> None:
        report, cfg, env = self.report, self.cfg, self.env
        if seen is None or (self.link is None and cfg.rollout.policy == "remote"):
            report.skip("dry run", "no observation" if seen is None else "no learner to ask")
            return
        look = getattr(env, "observe", None) or (lambda: seen)
        with self._driver("dry run"):
            policy = build_policy(cfg, self.link or StandaloneLink())
            if policy is None:
                report.skip("dry run", "rollout.policy=none")
                return
            dry_run(report, env, plain(cfg.task.get("safety")), look, policy, cfg.rollout.execute_horizon,
                    _QUESTIONS, report.stream)  # fmt: skip

    def _replay(self, episode: Recorded, guard: RobotGuard) -> None:
        report, env, safety = self.report, self.env, plain(self.cfg.task.get("safety"))
        passed = through_chain(SafetyChain.of(env.spec, safety), episode.states, episode.actions)
        report_passed(report, "replay, dry", passed, env.spec, report.stream)
        if self.options.move:
            with self._driver("replay"):
                move_along(report, env, safety, guard, episode, self._rate, report.stream)

    def _stops(self) -> None:
        report, cfg, env = self.report, self.cfg, self.env
        if getattr(env, "falls_on_stop", False) and not self.options.move:
            report.skip("e-stop, watchdog", "a stop takes this robot's torque away, it falls: hold it, and say --move")
            return
        with self._driver("stop"):
            check_stops(report, cfg, env, self.folder)
        estop = EmergencyStop(self.folder / "estop")
        try:
            check_estop_key(report, cfg, estop, self.options.attended, report.stream)
        finally:
            estop.close()
            (self.folder / "estop").unlink(missing_ok=True)

    @contextmanager
    def _driver(self, what: str) -> Iterator[None]:
        """A driver may raise anything: that is a finding, and the next question is asked."""
        try:
            yield
        except NotMovedError:
            raise
        except PartLostError as lost:
            self.report.fail(what, str(lost), "its cable and supply; the device in task.env")
        except Exception as fault:
            said = f"{type(fault).__name__}: {' '.join(str(fault).split())}"
            self.report.fail(what, f"{type(self.env).__name__} failed: {said}", "the driver's own words")
