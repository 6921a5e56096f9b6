"""Builds an actor from a resolved config and runs it to its exit code. Called by `actor.main`; the only place with cfg.

User mistakes end here as one line: expected, got, and the key to change.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openpi_client.action_chunk_broker import ActionChunkBroker
from serl_robot_infra.actor import Actor
from serl_robot_infra.adder import Adder
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.episode import Body, EpisodeRunner
from serl_robot_infra.interventions.none import NoIntervention
from serl_robot_infra.link import LearnerLink
from serl_robot_infra.observers.base import Observer, ObserverGroup
from serl_robot_infra.observers.console import ConsoleObserver, Vitals
from serl_robot_infra.pacing import Pace, PoliteStop
from serl_robot_infra.policy_client import MeasuredPolicy, RemotePolicy
from serl_robot_infra.rewards.environment import EnvironmentReward
from serl_robot_infra.safety import SafetyChain
from serl_transport.errors import SpoolFull, WireError
from serl_transport.specs import TaskSpec

USER_MISTAKE, INTERRUPTED = 2, 130
_SPOOL_RETRY_S = 0.5


def run_actor(cfg: DictConfig, stream: TextIO, connect: Callable[..., Any] | None = None) -> int:
    """Build, run, flush; see `actor.main`. `connect(cfg, spec)` makes the link (tests bring their own)."""
    stop = PoliteStop()
    stop.install()
    try:
        code = _run(cfg, stream, stop, connect or connect_learner)
    except (ValueError, WireError, OSError, OmegaConfBaseException) as mistake:
        print(f"actor: error: {mistake}", file=stream, flush=True)
        return USER_MISTAKE
    except InstantiationException as mistake:
        print(f"actor: error: {_innermost(mistake)}", file=stream, flush=True)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print(
            "actor: interrupted; what was not delivered is in the spool and will be sent at the next start", file=stream
        )
        return INTERRUPTED
    return code


def _run(cfg: DictConfig, stream: TextIO, stop: PoliteStop, connect: Callable[..., Any]) -> int:
    spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))  # type: ignore[arg-type]
    env = build_env(cfg, spec)
    link = connect(cfg, spec)
    try:
        actor, observer = build_actor(cfg, env, link, stream, stop)
        observer.message(
            f"task {spec.name}, renderer {getattr(env, 'renderer_name', 'none')}, learner {cfg.ip}:{cfg.port}"
        )
        result = actor.run()
        observer.message(f"{result.stopped_by}; {result.episodes} episodes")
        _flush(link, cfg.rollout.flush_timeout_s, observer)
        observer.close()
    finally:
        link.close()
        env.close()
    return INTERRUPTED if stop.signal is not None and stop.signal.name == "SIGINT" else 0


def build_env(cfg: DictConfig, spec: TaskSpec) -> Environment:
    """The environment of task.env; ValueError listing each field in which it differs from task.spec."""
    env = instantiate(cfg.task.env)
    lines = spec.differences(env.spec, "in task.spec", f"in {cfg.task.env._target_}")
    if lines:
        env.close()
        raise ValueError("task.spec and task.env disagree; change one of them:\n  " + "\n  ".join(lines))
    return env


def build_actor(
    cfg: DictConfig, env: Environment, link: LearnerLink, stream: TextIO, stop: PoliteStop
) -> tuple[Actor, Observer]:
    """The actor and its observers, on an environment and a link."""
    rollout = cfg.rollout
    policy = build_policy(cfg, link)
    pace = Pace(env.spec.control_hz if rollout.rate_hz is None else rollout.rate_hz)
    observer = ObserverGroup(_observers(cfg, env, stream, lambda: Vitals(
        infer_p50_ms=policy.p50_ms if policy else None, backlog=link.backlog, overruns=pace.overruns
    )))  # fmt: skip
    body = Body(
        env=env,
        broker=ActionChunkBroker(policy, rollout.execute_horizon) if policy else None,
        operator=build_operator(cfg, env),
        safety=SafetyChain(env.spec, **_plain(cfg.task.get("safety")) or {}),
        reward=instantiate(cfg.task.reward) if cfg.task.get("reward") else EnvironmentReward(),
        adder=Adder(keeper(link, observer, stop), rollout.batch_ticks),
        pace=pace,
    )
    runner = EpisodeRunner(
        body, observer, stop, cfg.unique_identifier, link.boot_id, rollout.demo_noise, rollout.hold_limit_s
    )
    return Actor(runner, link, observer, stop, rollout.mode, rollout.episodes), observer


def build_policy(cfg: DictConfig, link: LearnerLink) -> MeasuredPolicy | None:
    """The policy that rollout.policy names; None when this actor only gives demonstrations."""
    match cfg.rollout.policy:
        case "remote":
            return MeasuredPolicy(RemotePolicy(link))
        case "local":
            node = cfg.rollout.get("local_policy")
            if not node:
                raise ValueError("rollout.policy=local needs rollout.local_policy._target_")
            return MeasuredPolicy(instantiate(node, cfg=cfg, request=link.request, _recursive_=False))
        case "none":
            return None
        case other:
            raise ValueError(f"rollout.policy: expected remote, local or none, got {other!r}")


def build_operator(cfg: DictConfig, env: Environment) -> Any:
    """The operator of task.operator, or nobody."""
    if not cfg.task.get("operator") or not (cfg.rollout.operator or cfg.rollout.mode in ("follow", "demo")):
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


def connect_learner(cfg: DictConfig, spec: TaskSpec) -> Any:
    """The link to the learner at ip:port, with the spool of this unique_identifier in the run's folder."""
    from serl_transport.client import TrainerClient
    from serl_transport.config import TrainerConfig

    return TrainerClient(
        cfg.unique_identifier,
        cfg.ip,
        TrainerConfig(port_number=cfg.port, broadcast_port=cfg.broadcast_port),
        spec=spec,
        spool_dir=Path(cfg.runs_dir) / cfg.run / "spool" / cfg.unique_identifier,
        spool_bytes=cfg.rollout.spool_mb << 20,
    )


def _observers(cfg: DictConfig, env: Environment, stream: TextIO, vitals: Callable[[], Vitals]) -> list[Observer]:
    observers: list[Observer] = [ConsoleObserver(vitals, stream)]
    if cfg.rollout.video_every:
        from serl_robot_infra.observers.video import VideoObserver

        folder = Path(cfg.runs_dir) / cfg.run / "videos"
        observers.append(VideoObserver(folder, cfg.rollout.video_every, env.spec.control_hz))
    if cfg.rollout.rerun:
        from serl_robot_infra.observers.rerun_log import RerunObserver

        observers.append(RerunObserver(env.spec))
    return observers


def _flush(link: Any, timeout_s: float, observer: Observer) -> None:
    if link.backlog:
        observer.message(f"delivering the last {link.backlog} step batches, at most {timeout_s:g} s")
    if not link.flush(timeout_s):
        observer.message(f"{link.backlog} step batches stay in the spool; the next start of this actor delivers them")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if node is not None else None


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
