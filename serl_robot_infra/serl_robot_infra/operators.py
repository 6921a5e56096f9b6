"""Who helps, from a resolved config: the operator, what a person's being there changes, and what the start says of it.

Called by `wiring` and the benchmarks. A wrong value is a ValueError that names its key.
"""

from collections.abc import Sequence
from functools import partial

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig

from serl_robot_infra.envs.base import Environment
from serl_robot_infra.guard import Stoppable
from serl_robot_infra.interventions.base import Intervention, Voice
from serl_robot_infra.interventions.none import NoIntervention
from serl_robot_infra.link import LearnerLink
from serl_robot_infra.rewards.base import RewardSource
from serl_robot_infra.rewards.operator import OperatorReward
from serl_transport.contract.specs import TaskSpec


def build_operator(cfg: DictConfig, env: Environment, link: LearnerLink | None = None) -> Intervention:
    """Of the `operator` group, else of task.operator; nobody where none is named, or a script could not be asked.

    link: for a device that is reached through the learner (`_partial_: true` in its yaml).

    A person is always there: they may judge, discard and stop what they may not drive. Raises ValueError for a class
    that is no operator.
    """
    node = _node(cfg)
    may_drive = cfg.rollout.mode in ("follow", "demo") or (cfg.rollout.mode == "online" and cfg.rollout.operator)
    if node is None or get_object(node._target_) is NoIntervention or not (may_drive or is_person(cfg)):
        return NoIntervention()
    operator = instantiate(node, env=env)
    operator = operator(link=link) if isinstance(operator, partial) else operator
    if lacks := [name for name in ("reset", "act", "absent") if not callable(getattr(operator, name, None))]:
        raise ValueError(
            f"operator: {node._target_} has no {', '.join(lacks)}: let it inherit "
            "serl_robot_infra.interventions.base.Intervention, which answers what a device has nothing to say on"
        )
    return operator


def is_person(cfg: DictConfig) -> bool:
    """Is the operator a person's device (`Intervention.is_person`)?"""
    node = _node(cfg)
    return node is not None and getattr(get_object(node._target_), "is_person", False)


def control_rate(cfg: DictConfig, spec: TaskSpec) -> float:
    """Ticks per second, 0: as fast as possible. A person drives no faster than in real time."""
    rate = configured_rate(cfg, spec)
    return min(rate or spec.control_hz, spec.control_hz) if is_person(cfg) else rate


def configured_rate(cfg: DictConfig, spec: TaskSpec) -> float:
    """rollout.rate_hz, ticks per second."""
    return spec.control_hz if cfg.rollout.rate_hz is None else cfg.rollout.rate_hz


def slower(cfg: DictConfig, spec: TaskSpec) -> str | None:
    """What a rate below the task's means, for the actor's start; None: it is not below."""
    rate = control_rate(cfg, spec)
    if not 0 < rate < spec.control_hz:
        return None
    return (
        f"rollout.rate_hz={rate:g} is below spec.control_hz={spec.control_hz:g}: ticks are {1 / rate:g} s apart, "
        f"dataset, videos and limits count {1 / spec.control_hz:g} s"
    )


def ready_hint(cfg: DictConfig, env: Environment, voices: Sequence[Voice]) -> str | None:
    """How a person says that the scene is set, where rollout.wait_for_ready makes each episode wait for it; else None.

    `auto`: where the operator's device is a person's and the environment is a robot.
    """
    wait = cfg.rollout.get("wait_for_ready", "auto")
    if wait not in (True, False, "auto"):
        raise ValueError(f"rollout.wait_for_ready: expected auto, true or false, got {wait!r}")
    if not (is_person(cfg) and isinstance(env, Stoppable) if wait == "auto" else wait):
        return None
    lines = [line for voice in voices if "ready" in voice.vocabulary for line in voice.describe() if ": ready" in line]
    if not lines:
        raise ValueError(
            f"rollout.wait_for_ready={wait}: nobody can say ready; give the operator a key or a button for it "
            "(operator.keys.ready, operator.buttons.ready), take reward=human_key, or set it to false"
        )
    return f"set the scene, then press {lines[0].partition(':')[0]}"


def describe_operator(cfg: DictConfig, spec: TaskSpec, reward: RewardSource, voices: Sequence[Voice]) -> list[str]:
    """What each key and button does, and at which rate. ValueError: nobody can give the verdict that is asked for."""
    if isinstance(reward, OperatorReward) and not any("success" in voice.vocabulary for voice in voices):
        raise ValueError(
            "reward=operator: the operator has no key or button for success; give it one (operator.keys.success, "
            "operator.buttons.success), take operator=keyboard or operator=gamepad, or reward=human_key"
        )
    lines = [f"  {line}" for voice in voices for line in voice.describe()]
    rate, configured = control_rate(cfg, spec), configured_rate(cfg, spec)
    if rate != configured:
        lines.append(f"  a person drives: {rate:g} Hz, real time, in place of rollout.rate_hz={configured:g}")
    return ["operator:", *lines] if lines else []


def _node(cfg: DictConfig) -> DictConfig | None:
    return cfg.get("operator") or cfg.task.get("operator")
