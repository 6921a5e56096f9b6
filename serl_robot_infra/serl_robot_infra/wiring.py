"""Builds the parts of an actor from a resolved config: one function a part, `build_actor` for the whole.

Called by `main` and the benchmarks. Only `main`, `connect`, `operators` and this file see cfg; a wrong value is a
ValueError that names its key.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TextIO

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.realtime_chunk_broker import RealtimeChunkBroker
from serl_robot_infra import live_rollout
from serl_robot_infra.actor import Actor
from serl_robot_infra.adder import Adder
from serl_robot_infra.connect import waiting
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.episode import ControlStack, EpisodeRunner
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.groot_policy import GrootPolicy, GrootSettings
from serl_robot_infra.guard import RobotGuard, Stoppable
from serl_robot_infra.keyboard import character_of, terminal_keyboard
from serl_robot_infra.link import LearnerLink
from serl_robot_infra.observers.base import Observer, ObserverGroup
from serl_robot_infra.observers.console import ConsoleObserver, Vitals
from serl_robot_infra.observers.live import LiveObserver
from serl_robot_infra.observers.status import StatusObserver
from serl_robot_infra.observers.trials import TrialTable
from serl_robot_infra.openpi_policy import OpenpiPolicy, OpenpiSettings
from serl_robot_infra.operators import (
    build_operator,
    configured_rate,
    control_rate,
    describe_operator,
    is_person,
    ready_hint,
    slower,
)
from serl_robot_infra.pacing import Pace, StopSignal
from serl_robot_infra.policy_client import MeasuredPolicy, RemotePolicy
from serl_robot_infra.rewards.base import RewardSource
from serl_robot_infra.rewards.environment import EnvironmentReward
from serl_robot_infra.safety import SafetyChain
from serl_robot_infra.sender import Sender
from serl_robot_infra.watchdog import WatchdogProcess
from serl_transport.contract.people import who
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)

_DEMO_NOISE = 0.15  # share of the action range (DART, Laskey et al. 2017)


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
    watchdog, rate = cfg.rollout.get("watchdog") or {}, control_rate(cfg, env.spec)
    robot = env if isinstance(env, Stoppable) else None
    enabled = watchdog.get("enabled", "auto")
    if enabled not in (True, False, "auto"):
        raise ValueError(f"rollout.watchdog.enabled: expected auto, true or false, got {enabled!r}")
    watched = robot is not None if enabled == "auto" else enabled
    stop_s = watchdog.get("stop_ms", 500.0) / 1e3 if watched else None
    stopper, process = getattr(env, "stopper", None), None
    if robot is not None and stopper is not None and stop_s is not None:
        process = WatchdogProcess(stopper, estop.path, 1.0 / (rate or env.spec.control_hz), stop_s)
    return RobotGuard(robot, estop, rate, stop_s, process)


def restart_s(cfg: DictConfig) -> float | None:
    """rollout.watchdog.restart_s, seconds; null: a call that hangs is never given up."""
    seconds = (cfg.rollout.get("watchdog") or {}).get("restart_s", 60.0)
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0):
        raise ValueError(f"rollout.watchdog.restart_s: expected seconds above 0 or null, got {seconds!r}")
    return seconds


def describe_guard(guard: RobotGuard, env: Environment) -> str:
    """Whether a watchdog stops this robot, in one line, for the actor's start."""
    if guard.stop_s is not None:
        after = f"watchdog: controlled stop after {guard.stop_s * 1e3:g} ms without an action"
        if guard.watchdog is not None:
            return f"{after}, by a process of its own as well"
        return f"{after}; {type(env).__name__} names no stopper, so a driver that blocks Python blocks the watchdog"
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
    cfg: DictConfig, env: Environment, link: LearnerLink, stream: TextIO, stop: StopSignal, guard: RobotGuard
) -> tuple[Actor, Observer, Sender]:
    """The actor, its observers and its sender (to be closed before the link), on an environment and a link."""
    rollout = cfg.rollout
    policy = build_policy(cfg, link)
    broker = build_broker(cfg, policy)
    pace = Pace(control_rate(cfg, env.spec))
    operator, reward = build_operator(cfg, env, link), build_reward(cfg, waiting(stream, stop))
    voices = [voice for voice in (operator, reward) if hasattr(voice, "words")]
    watchers = _observers(cfg, env, link, stream, lambda: Vitals(
        infer_p50_ms=policy.p50_ms if policy else None,
        backlog=link.backlog,
        overruns=pace.overruns,
        refused=link.refused_items,
    ))  # fmt: skip
    observer = ObserverGroup(watchers)
    sender = Sender(observer, stop)
    stack = ControlStack(
        env=env,
        broker=broker,
        operator=operator,
        safety=SafetyChain.of(env.spec, plain(cfg.task.get("safety"))),
        reward=reward,
        adder=Adder(link.send_item, rollout.batch_ticks, sender),
        pace=pace,
        guard=guard,
        voices=voices,
    )
    runner = EpisodeRunner(
        stack,
        observer,
        stop,
        actor_id=cfg.unique_identifier,
        boot_id=link.boot_id,
        may_take_over=rollout.operator,
        demo_noise=demo_noise(cfg, env),
        hold_limit_s=rollout.hold_limit_s,
        over=lambda: link.over,
        operator_name=who(cfg.get("operator_name")),
        ready=ready_hint(cfg, env, voices),
    )
    evaluation = replace(runner, stack=evaluation_stack(cfg, stack))
    for line in [*filter(None, [slower(cfg, env.spec)]), *describe_operator(cfg, env.spec, stack.reward, voices)]:
        print(line, file=stream, flush=True)
    paces = {id(pace): (pace, control_rate(cfg, env.spec))}
    paces.setdefault(id(evaluation.stack.pace), (evaluation.stack.pace, configured_rate(cfg, env.spec)))
    keys = {
        "rate_hz": live_rollout.rate(env.spec.control_hz, [*paces.values()], guard),
        "video_every": live_rollout.video_every([seen for seen in watchers if hasattr(seen, "every")]),
    }
    live = live_rollout.LiveRollout(keys, observer, link.set_status)
    actor = Actor(runner, evaluation, link, observer, stop, guard.estop, rollout.mode, rollout.episodes, live)
    return actor, observer, sender


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
            spec = TaskSpec.from_dict(plain(cfg.task.spec))
            settings = OpenpiSettings.of(plain(cfg.rollout.get("openpi")) or {}, spec)
            guided = cfg.rollout.get("realtime") == "rtc"
            return MeasuredPolicy(OpenpiPolicy(settings, spec, run=cfg.run, guided=guided))
        case "groot":
            spec = TaskSpec.from_dict(plain(cfg.task.spec))
            settings = GrootSettings.of(plain(cfg.rollout.get("groot")) or {}, spec)
            return MeasuredPolicy(GrootPolicy(settings, spec, guided=cfg.rollout.get("realtime") == "rtc"))
        case "none":
            return None
        case other:
            raise ValueError(f"rollout.policy: expected remote, local, openpi, groot or none, got {other!r}")


def build_reward(cfg: DictConfig, on_wait: Callable[[str], None] = log.warning) -> RewardSource:
    """The reward source of the task's own yaml, else of the `reward` group, else the environment's.

    on_wait: told again and again by a source that waits for a server (`_partial_: true` in its yaml).
    """
    settings = plain(_reward_node(cfg)) or {}
    settings.pop("evaluate_with", None)
    source = instantiate(settings) if settings else EnvironmentReward()
    return source(on_wait=on_wait) if isinstance(source, partial) else source


def evaluation_stack(cfg: DictConfig, stack: ControlStack) -> ControlStack:
    """What evaluations run on: their own judge, and the full rate where no person drives or judges."""
    reward = evaluation_reward(cfg, stack.reward)
    voices = [voice for voice in stack.voices if voice is not stack.reward or reward is stack.reward]
    if is_person(cfg) and reward.success_source != "human":
        return replace(stack, reward=reward, voices=voices, pace=Pace(configured_rate(cfg, stack.env.spec)))
    return replace(stack, reward=reward, voices=voices)


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


def _observers(
    cfg: DictConfig, env: Environment, link: LearnerLink, stream: TextIO, vitals: Callable[[], Vitals]
) -> list[Observer]:
    observers: list[Observer] = [ConsoleObserver(vitals, stream), StatusObserver(link.set_status)]
    run_dir, every = Path(cfg.runs_dir) / cfg.run, cfg.rollout.video_every
    videos = {"demo": every, "online": every, "eval": cfg.rollout.get("evaluation_video_every", 0)}
    if any(videos.values()) and env.spec.cameras:
        from serl_robot_infra.observers.video import VideoObserver

        observers.append(VideoObserver(run_dir / "videos", videos, env.spec.control_hz))
    observers.append(TrialTable(run_dir))  # behind the videos, which it names
    if cfg.ip:
        observers.append(LiveObserver(link, vitals))
    if cfg.rollout.rerun:
        from serl_robot_infra.observers.rerun_log import connected

        viewer = connected(env.spec, cfg.rollout.rerun_address, observers[0].message)
        observers += [viewer] if viewer else []
    return observers


def plain(node: Any) -> Any:
    """A config node as plain containers, interpolations resolved; None stays None."""
    return OmegaConf.to_container(node, resolve=True) if node is not None else None
