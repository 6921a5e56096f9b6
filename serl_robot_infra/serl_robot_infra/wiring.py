"""Builds an actor from a resolved config and runs it to its exit code. Called by `actor.main`; the only place with cfg.

User mistakes end here as one line: expected, got, and the key to change.
"""

import logging
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TextIO

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.realtime_chunk_broker import RealtimeChunkBroker
from serl_config.mistakes import mistake_message
from serl_robot_infra.actor import Actor
from serl_robot_infra.adder import Adder
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.episode import Body, EnvironmentFailedError, EpisodeRunner
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard, Stoppable
from serl_robot_infra.interventions.none import NoIntervention
from serl_robot_infra.keyboard import character_of, terminal_keyboard
from serl_robot_infra.link import LearnerLink
from serl_robot_infra.observers.base import Observer, ObserverGroup
from serl_robot_infra.observers.console import ConsoleObserver, Vitals
from serl_robot_infra.observers.status import StatusObserver
from serl_robot_infra.openpi_policy import OpenpiPolicy, OpenpiSettings
from serl_robot_infra.pacing import Pace, PoliteStop
from serl_robot_infra.policy_client import MeasuredPolicy, RemotePolicy
from serl_robot_infra.rewards.base import RewardSource
from serl_robot_infra.rewards.environment import EnvironmentReward
from serl_robot_infra.safety import SafetyChain, describe
from serl_robot_infra.standalone import StandaloneLink
from serl_robot_infra.task_yaml import check_task
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import Refused, SpoolError, SpoolFull, WireError
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)

FAILED, USER_MISTAKE, INTERRUPTED = 1, 2, 130
_SPOOL_RETRY_S = 0.5
_WAIT_LINE_S = 5.0
_DEMO_NOISE = 0.15  # share of the action range (DART, Laskey et al. 2017)


class StoppedError(Exception):
    """A signal came while a server was waited for."""


def run_actor(cfg: DictConfig, stream: TextIO) -> int:
    """Build, run, flush; see `actor.main`."""
    stop = PoliteStop()
    try:
        with stop.installed():
            _run(cfg, stream, stop)
    except (ValueError, ImportError, WireError, SpoolError, OSError, OmegaConfBaseException) as mistake:
        log.debug("where it came from", exc_info=True)
        return _refuse(str(mistake), stream)
    except InstantiationException as mistake:
        log.debug("where it came from", exc_info=True)
        return _refuse(mistake_message(mistake), stream)
    except EnvironmentFailedError as fault:
        log.debug("where it came from", exc_info=True)
        print(f"actor: error: {fault}; what was not delivered is sent at the next start", file=stream, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("actor: interrupted; what was not delivered is sent at the next start", file=stream, flush=True)
        return INTERRUPTED
    except StoppedError:
        pass
    return INTERRUPTED if stop.signal is signal.SIGINT else 0


def _run(cfg: DictConfig, stream: TextIO, stop: PoliteStop) -> None:
    check_task(_plain(cfg.task), f"config/task/{cfg.task.get('name') or '<yours>'}.yaml")
    spec = TaskSpec.from_dict(_plain(cfg.task.spec))
    with ExitStack() as resources:
        env = build_env(cfg, spec)
        resources.callback(env.close)
        renderer = getattr(env, "renderer_name", "none")
        learner = f"{cfg.ip}:{cfg.port}" if cfg.ip else "none"
        print(f"task {spec.name}, renderer {renderer}, learner {learner}", file=stream, flush=True)
        print(describe(_plain(cfg.task.get("safety"))), file=stream, flush=True)
        estop = EmergencyStop(Path(cfg.runs_dir) / cfg.run / "estop")
        resources.enter_context(estop.installed())
        listen_for_estop(cfg, estop, stream)
        guard = build_guard(cfg, env, estop)
        resources.callback(guard.close)
        print(describe_guard(guard, env), file=stream, flush=True)
        link = connect_learner(cfg, spec, stream, stop) if cfg.ip else standalone(cfg)
        resources.callback(link.stop)
        actor, observer = build_actor(cfg, env, link, stream, stop, guard)
        try:
            result = actor.run()
        except Refused:  # another process has this actor's name now: what was recorded is still taken
            _flush(link, cfg.rollout.flush_timeout_s, observer)
            raise
        observer.message(f"{result.stopped_by}; {result.episodes} episodes")
        _flush(link, cfg.rollout.flush_timeout_s, observer)
        observer.close()


def _refuse(message: str, stream: TextIO) -> int:
    print(f"actor: error: {message}", file=stream, flush=True)
    return USER_MISTAKE


def build_env(cfg: DictConfig, spec: TaskSpec) -> Environment:
    """The environment of task.env; ValueError listing each field in which it differs from task.spec."""
    env = instantiate(cfg.task.env)
    if missing := [name for name in ("spec", "reset", "step", "close") if not hasattr(env, name)]:
        raise ValueError(f"task.env: {cfg.task.env._target_} lacks {', '.join(missing)}; see envs/base.py")
    try:
        signature(env.reset).bind(0, actuator_noise=0.0)
    except TypeError as error:
        raise ValueError(
            f"task.env: expected {cfg.task.env._target_}.reset(seed, *, actuator_noise=0.0): {error}"
        ) from None
    lines = spec.differences(env.spec, "in task.spec", f"in {cfg.task.env._target_}")
    if lines:
        env.close()
        raise ValueError("task.spec and task.env disagree; change one of them:\n  " + "\n  ".join(lines))
    return env


def listen_for_estop(cfg: DictConfig, estop: EmergencyStop, stream: TextIO) -> None:
    """Let rollout.estop_key press the e-stop, where the actor has a terminal; says so there."""
    key = cfg.rollout.get("estop_key")
    if key is None:
        return
    character_of(key, "rollout.estop_key")
    keyboard = terminal_keyboard()
    if keyboard is not None:
        keyboard.on(key, lambda: estop.press(f"the key {key} at the actor's terminal"), "rollout.estop_key")
        print(f"e-stop: press {key} here", file=stream, flush=True)


def build_guard(cfg: DictConfig, env: Environment, estop: EmergencyStop) -> RobotGuard:
    """The guard of this environment: with a watchdog where the robot moves by itself, or where the config says so."""
    watchdog, rate = cfg.rollout.get("watchdog") or {}, cfg.rollout.rate_hz
    robot = env if isinstance(env, Stoppable) else None
    enabled = watchdog.get("enabled", "auto")
    if enabled not in (True, False, "auto"):
        raise ValueError(f"rollout.watchdog.enabled: expected auto, true or false, got {enabled!r}")
    watched = robot is not None if enabled == "auto" else enabled
    stop_s = watchdog.get("stop_ms", 500.0) / 1e3 if watched else None
    return RobotGuard(robot, estop, env.spec.control_hz if rate is None else rate, stop_s)


def describe_guard(guard: RobotGuard, env: Environment) -> str:
    """Whether a watchdog stops this robot, in one line, for the actor's start."""
    if guard.stop_s is not None:
        return f"watchdog: controlled stop after {guard.stop_s * 1e3:g} ms without an action"
    return f"no watchdog: {type(env).__name__} has no hold() and stop(), or rollout.watchdog.enabled is false"


def demo_noise(cfg: DictConfig, env: Environment) -> float:
    """rollout.demo_noise; `auto`: 0.15 in a simulation, 0 on a robot (it has hold and stop), which is not disturbed."""
    noise = cfg.rollout.demo_noise
    if noise == "auto":
        return 0.0 if isinstance(env, Stoppable) else _DEMO_NOISE
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not noise >= 0:
        raise ValueError(f"rollout.demo_noise: expected auto or a number, 0 or more, got {noise!r}")
    return float(noise)


def build_broker(cfg: DictConfig, policy: BasePolicy | None) -> ActionChunkBroker | RealtimeChunkBroker | None:
    """How chunks become single actions: one after the other, or the next while one is executed (rollout.realtime)."""
    rollout = cfg.rollout
    mode = rollout.get("realtime", "off")
    if policy is None:
        return None
    if mode in ("off", False):  # yaml reads a bare off as false
        return ActionChunkBroker(policy, rollout.execute_horizon)
    misses = (rollout.get("watchdog") or {}).get("hold_after_chunks", 2)
    return RealtimeChunkBroker(policy, rollout.execute_horizon, mode, misses)


def build_actor(
    cfg: DictConfig, env: Environment, link: LearnerLink, stream: TextIO, stop: PoliteStop, guard: RobotGuard
) -> tuple[Actor, Observer]:
    """The actor and its observers, on an environment and a link."""
    rollout = cfg.rollout
    policy = build_policy(cfg, link)
    broker = build_broker(cfg, policy)
    pace = Pace(env.spec.control_hz if rollout.rate_hz is None else rollout.rate_hz)
    observer = ObserverGroup(_observers(cfg, env, link, stream, lambda: Vitals(
        infer_p50_ms=policy.p50_ms if policy else None,
        backlog=link.backlog,
        overruns=pace.overruns,
        refused=link.refused_items,
    )))  # fmt: skip
    body = Body(
        env=env,
        broker=broker,
        operator=build_operator(cfg, env),
        safety=SafetyChain.of(env.spec, _plain(cfg.task.get("safety"))),
        reward=build_reward(cfg, waiting(stream, stop)),
        adder=Adder(keeper(link, observer, stop), rollout.batch_ticks),
        pace=pace,
        guard=guard,
    )
    settings = {
        "actor_id": cfg.unique_identifier,
        "boot_id": link.boot_id,
        "may_take_over": rollout.operator,
        "demo_noise": demo_noise(cfg, env),
        "hold_limit_s": rollout.hold_limit_s,
    }
    runner = EpisodeRunner(body, observer, stop, **settings)
    evaluation_body = replace(body, reward=evaluation_reward(cfg, body.reward))
    evaluation = EpisodeRunner(evaluation_body, observer, stop, **settings)
    return Actor(runner, link, observer, stop, rollout.mode, rollout.episodes, guard.estop, evaluation), observer


def build_policy(cfg: DictConfig, link: LearnerLink) -> MeasuredPolicy | None:
    """The policy that rollout.policy names; None when this actor only gives demonstrations."""
    match cfg.rollout.policy:
        case "remote":
            return MeasuredPolicy(RemotePolicy(link))
        case "local":
            node = cfg.rollout.get("local_policy")
            if not node:
                raise ValueError("rollout.policy=local needs rollout.local_policy._target_")
            return MeasuredPolicy(instantiate(node, cfg=cfg, link=link, _recursive_=False))
        case "openpi":
            return MeasuredPolicy(build_openpi(cfg))
        case "none":
            return None
        case other:
            raise ValueError(f"rollout.policy: expected remote, local, openpi or none, got {other!r}")


def build_openpi(cfg: DictConfig) -> OpenpiPolicy:
    """The policy behind the websocket server of rollout.openpi."""
    spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))  # type: ignore[arg-type]
    settings = OpenpiSettings.of(_plain(cfg.rollout.get("openpi")) or {}, spec)
    return OpenpiPolicy(settings, spec, run=cfg.run, guided=cfg.rollout.get("realtime") == "rtc")


def build_reward(cfg: DictConfig, on_wait: Callable[[str], None] = log.warning) -> RewardSource:
    """The reward source of the task's own yaml, else of the `reward` group, else the environment's.

    on_wait: told again and again by a source that waits for a server (`_partial_: true` in its yaml).
    """
    settings = _plain(_reward_node(cfg)) or {}
    settings.pop("evaluate_with", None)
    source = instantiate(settings) if settings else EnvironmentReward()
    return source(on_wait=on_wait) if isinstance(source, partial) else source


def evaluation_reward(cfg: DictConfig, reward: RewardSource) -> RewardSource:
    """Who judges evaluations: `reward`, as everything, unless reward.evaluate_with says that the environment does."""
    node = _reward_node(cfg)
    match node.get("evaluate_with") if node else None:
        case None:
            return reward
        case "environment":
            return EnvironmentReward()
        case other:
            raise ValueError(f"reward.evaluate_with: expected environment or null (the same reward), got {other!r}")


def _reward_node(cfg: DictConfig) -> DictConfig | None:
    return cfg.task.get("reward") or cfg.get("reward")


def build_operator(cfg: DictConfig, env: Environment) -> Any:
    """The operator of task.operator; nobody where none is named or none can be asked."""
    may_be_asked = cfg.rollout.mode in ("follow", "demo") or (cfg.rollout.mode == "online" and cfg.rollout.operator)
    if not cfg.task.get("operator") or not may_be_asked:
        return NoIntervention()
    return instantiate(cfg.task.operator, env=env)


def keeper(link: LearnerLink, observer: Observer, stop: PoliteStop) -> Callable[[dict[str, Any]], None]:
    """`send` of the adder: spool the batch; while the spool is full the robot holds and people are told."""

    def keep(body: dict[str, Any]) -> None:
        while True:
            try:
                link.send_item(body)
                return
            except SpoolFull as full:
                if stop:
                    raise
                observer.message(f"{full}; the robot holds until the learner has taken some")
                stop.wait(_SPOOL_RETRY_S)

    return keep


def connect_learner(cfg: DictConfig, spec: TaskSpec, stream: TextIO, stop: PoliteStop) -> TrainerClient:
    """The link to the learner at ip:port, once that is there; its spool lies in the run's folder.

    Raises StoppedError on a signal while waiting, WireError when the learner refuses (another run, task or version).
    """
    run_dir = Path(cfg.runs_dir) / cfg.run
    return TrainerClient(
        cfg.unique_identifier,
        cfg.ip,
        TrainerConfig(
            port_number=cfg.port, broadcast_port=cfg.broadcast_port, keys_dir=OmegaConf.select(cfg, "security.keys_dir")
        ),
        spec=spec,
        spool_dir=run_dir / "spool" / cfg.unique_identifier,
        spool_bytes=cfg.rollout.spool_mb << 20,
        ledger_path=run_dir / "spool" / f"{cfg.unique_identifier}.acknowledged.jsonl" if cfg.rollout.ledger else None,
        on_wait=waiting(stream, stop),
        run=cfg.run,
    )


def waiting(stream: TextIO, stop: PoliteStop) -> Callable[[str], None]:
    """What a client tells while it waits: a line now and then; raises StoppedError on a signal."""
    next_line = 0.0

    def on_wait(message: str) -> None:
        nonlocal next_line
        if stop:
            raise StoppedError
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + _WAIT_LINE_S
            print(message, file=stream, flush=True)

    return on_wait


def standalone(cfg: DictConfig) -> StandaloneLink:
    """The link of ip=null; ValueError unless the config asks for what works without a learner."""
    rollout = cfg.rollout
    if rollout.mode != "eval" or rollout.policy not in ("local", "openpi") or rollout.episodes is None:
        raise ValueError(
            "ip=null runs without a learner: it needs rollout.mode=eval, rollout.policy=local or openpi, and "
            "rollout.episodes, "
            f"got {rollout.mode}, {rollout.policy} and {rollout.episodes}"
        )
    return StandaloneLink()


def _observers(
    cfg: DictConfig, env: Environment, link: LearnerLink, stream: TextIO, vitals: Callable[[], Vitals]
) -> list[Observer]:
    observers: list[Observer] = [ConsoleObserver(vitals, stream), StatusObserver(link.set_status)]
    if cfg.rollout.video_every and env.spec.cameras:
        from serl_robot_infra.observers.video import VideoObserver

        folder = Path(cfg.runs_dir) / cfg.run / "videos"
        observers.append(VideoObserver(folder, cfg.rollout.video_every, env.spec.control_hz))
    if cfg.rollout.rerun:
        from serl_robot_infra.observers.rerun_log import connected

        viewer = connected(env.spec, cfg.rollout.rerun_address, observers[0].message)
        observers += [viewer] if viewer else []
    return observers


def _flush(link: LearnerLink, timeout_s: float, observer: Observer) -> None:
    if link.backlog:
        observer.message(f"delivering the last {link.backlog} step batches, at most {timeout_s:g} s")
    if not link.flush(timeout_s):
        observer.message(f"{link.backlog} step batches stay in the spool; the next start of this actor delivers them")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if node is not None else None
