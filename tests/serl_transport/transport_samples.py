"""Small valid specs, steps and batches for the tests of the transport; every value is derived from a seed."""

import numpy as np

from serl_transport.contract.schema import EpisodeInfo, Observation, Outcome, StepBatch, TimeStep
from serl_transport.contract.specs import TaskSpec

SPEC_DICT = {
    "name": "pick",
    "prompt": "lift the cube",
    "cameras": {"front": [6, 8], "wrist": [4, 4]},
    "state_names": ["x", "y", "z"],
    "state_low": [-1.0, -1.0, 0.0],
    "state_high": [1.0, 1.0, float("inf")],
    "action_names": ["dx", "grip"],
    "action_low": [-0.1, 0.0],
    "action_high": [0.1, 1.0],
    "control_hz": 10.0,
    "max_ticks": 20,
}


def spec(**changes) -> TaskSpec:
    return TaskSpec.from_dict({**SPEC_DICT, **changes})


def info(episode_id: str = "e1", boot_id: str = "b1") -> EpisodeInfo:
    return EpisodeInfo(episode_id, "robot-1", boot_id, "pick", "lift the cube", "online", "online", 7, 1.5e9)


def observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    images = {
        name: rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        for name, size in {"front": (6, 8), "wrist": (4, 4)}.items()
    }
    return Observation(images, rng.uniform(-1, 1, 3).astype(np.float32))


def step(tick: int, *, done: bool = False, truncated: bool = False) -> TimeStep:
    action = np.array([0.01 * tick, 1.0], np.float32)
    return TimeStep(observation(tick), action, float(done), done, truncated, done, tick % 2 == 1, 3, 1000 + tick)


def batch(first_tick: int = 0, n: int = 3, *, final: bool = False, episode: EpisodeInfo | None = None) -> StepBatch:
    """Ticks first_tick..first_tick+n of a successful episode."""
    steps = [step(first_tick + i, done=final and i == n - 1) for i in range(n)]
    end = (
        {"last_observation": observation(first_tick + n), "outcome": Outcome(True, "environment", None)}
        if final
        else {}
    )
    return StepBatch.from_steps(episode or info(), first_tick, steps, **end)
