"""What both sides share: the task, its seeds, the operator, evaluation. Called by all files of this folder.

Ours and LeRobot's learn in the same environment object, with the same demonstrations, operator and evaluation episodes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from lockstep import FIRST_CURVE_SEED, FIRST_EVAL_SEED
from omegaconf import DictConfig, OmegaConf

from flowserl_cli.compose import load_config
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.interventions.base import Intervention
from serl_robot_infra.wiring import build_env, build_operator, demo_noise
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

TASKS = {"state": "pick_gym_hil_state", "images": "pick_gym_hil"}
FIRST_SEED = {"curve": FIRST_CURVE_SEED, "before": FIRST_EVAL_SEED, "after": FIRST_EVAL_SEED}


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of either side."""

    observation: str  # state | images
    seed: int
    env_steps: int  # online control ticks
    demos: int  # successful demonstrations
    eval_episodes: int  # before and after
    curve_every: int  # online ticks between points of the curve
    curve_episodes: int  # of each of them

    @property
    def task(self) -> str:
        """Of config/task."""
        return TASKS[self.observation]

    def episodes_at(self, point: str) -> int:
        """Of one evaluation."""
        return self.curve_episodes if point == "curve" else self.eval_episodes


class Robot:
    """Environment and operator of one task, built as an actor builds them."""

    def __init__(self, settings: Settings) -> None:
        self.cfg: DictConfig = load_config([f"task={settings.task}", f"seed={settings.seed}"])
        spec = OmegaConf.to_container(self.cfg.task.spec, resolve=True)
        self.env: Environment = build_env(self.cfg, TaskSpec.from_dict(spec))
        self.operator: Intervention = build_operator(self.cfg, self.env)

    def begin(self, seed: int, mode: str) -> Observation:
        """The episode that `seed` names: disturbed in a demonstration, as the actor's are."""
        self.operator.reset(np.random.default_rng([seed, 2]), from_start=mode == "demo")
        return self.env.reset(seed, actuator_noise=demo_noise(self.cfg, self.env) if mode == "demo" else 0.0)


def evaluate(env: Environment, act: Callable[[Observation], np.ndarray], trials: int, first_seed: int) -> int:
    """Successes of `act` without help, in the episodes first_seed, first_seed + 1, …"""
    successes = 0
    for seed in range(first_seed, first_seed + trials):
        observation, over = env.reset(seed), False
        while not over:
            result = env.step(act(observation))
            observation, over = result.observation, result.terminated or result.truncated
        successes += result.success
    return successes
