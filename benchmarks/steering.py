"""How far a cloned flow can be steered by its noise: the most that noise-space SAC (DSRL) could make of it.

    python benchmarks/steering.py budget.demos=30 budget.clone_steps=1500

Clones demonstrations in lock step (benchmarks/lockstep.py), then acts without learning anything: of n chunks, each from
a noise of its own, the one whose first actions are nearest to the scripted expert's is executed. One JSON row for each
n and for each way to draw a noise: for every tick of the chunk (`per_step`), or one for all of them (`tiled`).
"""

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch
from lockstep import FIRST_EVAL_SEED, Lockstep, opened, rate
from torch import Tensor

from serl_launcher.policies.base import FlowPolicy, PolicyInput, sample
from serl_robot_infra.envs.base import ScriptedEnvironment
from serl_robot_infra.wiring import build_env
from serl_transport.contract.schema import Observation

Choice = Callable[[Observation, np.ndarray], np.ndarray]
"""Observation and the expert's action -> the chunk float32[ah, ad] to execute."""

COMPARED = 2  # first actions of a chunk that are compared with the expert's next one


def nearest(made: Tensor, goal: Tensor, robot_dim: int) -> int:
    """Which of float32[n, ah, ad] begins nearest to the action float32[1, 1, ad]."""
    return int((made - goal)[:, :COMPARED, :robot_dim].square().sum((1, 2)).argmin())


def success(env: ScriptedEnvironment, choose: Choice, horizon: int, seed: int) -> bool:
    """One episode."""
    observation, expert = env.reset(seed), env.expert()
    while True:
        wanted = expert.act()
        expert.reset()
        for action in choose(observation, wanted)[:horizon]:
            result = env.step(action)
            observation = result.observation
            if result.terminated or result.truncated:
                return bool(result.success)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--best-of", type=lambda text: [*map(int, text.split(","))], default="1,8,64", help="n,n,…")
    parser.add_argument("words", nargs="*", help="overrides of the config, and budget.<field>=<value>")
    args = parser.parse_args()
    with opened(["algo=sft_pi0", *args.words]) as run:
        measure(run, args)


def measure(run: Lockstep, args: argparse.Namespace) -> None:
    """Clone, then a row for each variant and n."""
    run.demonstrate()
    run.trainer.learner.begin_stage("train")
    run.train("clone", "train", run.budget.clone_steps, run.budget.clone_steps)
    cfg, policy = run.cfg, run.trainer.learner.agent.policy.eval()
    tensors = dict(policy.named_parameters())
    with torch.no_grad():
        for name, average in run.trainer.learner.averaged.items():
            tensors[name].copy_(average)
    env = build_env(cfg, run.spec)
    seeds = range(FIRST_EVAL_SEED, FIRST_EVAL_SEED + args.episodes)
    for variant, rows in (("per_step", policy.action_horizon), ("tiled", 1)):
        for n in args.best_of:
            choose = oracle(policy, run.spec.prompt, n, rows, cfg.serving.flow_steps, cfg.seed)
            wins = sum(success(env, choose, cfg.rollout.execute_horizon, seed) for seed in seeds)
            row = {
                "policy": cfg.policy.name,
                "task": run.spec.name,
                "seed": cfg.seed,
                "words": args.words,
                "variant": variant,
                "best_of": n,
            }
            print(json.dumps(row | rate(wins, args.episodes)), flush=True)


def oracle(policy: FlowPolicy, prompt: str, n: int, rows: int, flow_steps: int, seed: int) -> Choice:
    """Of n chunks from noises float32[rows, ad], spread over the chunk, the one nearest to what the expert wants."""
    generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def choose(observation: Observation, wanted: np.ndarray) -> np.ndarray:
        images = {camera: image[None] for camera, image in observation.images.items()}
        prefix = policy.encode(PolicyInput(images=images, state=observation.state[None], prompts=[prompt]))
        noise = torch.randn(n, rows, policy.action_dim, generator=generator).expand(-1, policy.action_horizon, -1)
        made = sample(policy, prefix.repeat(n), noise, flow_steps)
        goal = policy.normalise_actions(torch.tensor(wanted, dtype=torch.float32)[None, None])
        best = nearest(made, goal, policy.robot_dim)
        return policy.physical_actions(made[best : best + 1])[0].float().numpy()

    return choose


if __name__ == "__main__":
    main()
