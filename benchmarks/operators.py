"""How good the scripted operators of Meta-World's tasks are: a policy learns from the one who corrects it.

    python benchmarks/operators.py box-close-v3 pick-place-v3
    python benchmarks/operators.py assembly-v3 --repeat 4 --episodes 30

One JSON row for each task, operator (ours, where there is one, and Meta-World's own) and condition: from the start,
from there under the disturbance of demonstrations, and from where 1.5 s of wandering have led, half of the time it has.
"""

import argparse
import json
import statistics

import numpy as np
from lockstep import FIRST_EVAL_SEED

from serl_robot_infra.envs.metaworld import STEP_HZ, MetaWorldEnv

SECONDS = 3.0  # of simulated time an episode may take
CONDITIONS = {"start": (0.0, False), "disturbed": (0.15, False), "wandering": (0.0, True)}


def episodes(env: MetaWorldEnv, ours: bool, disturbance: float, wanders: bool, count: int) -> list[tuple[bool, int]]:
    """(success, ticks) of each."""
    reach, limit = env.spec.action_high[0], env.spec.max_ticks
    rng = np.random.default_rng(0)
    results = []
    for seed in range(FIRST_EVAL_SEED, FIRST_EVAL_SEED + count):
        env.reset(seed, actuator_noise=disturbance)
        expert = env.expert() if ours else env.script()
        bias, flips = rng.normal(0, 0.3 * reach, 3), rng.random(limit // 2) < 0.1
        for tick in range(limit):
            action = expert.act()
            if wanders and tick < limit // 2:
                action[:3] += bias + rng.normal(0, 0.3 * reach, 3)
                action[3] *= -1 if flips[tick] else 1
            result = env.step(action)
            if result.terminated or result.truncated:
                break
        results.append((result.success, tick + 1))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", help="as Meta-World names them")
    parser.add_argument("--repeat", type=int, nargs="+", default=[2, 4], help="its 80 Hz steps per tick")
    parser.add_argument("--episodes", type=int, default=60)
    args = parser.parse_args()
    for task in args.tasks:
        for repeat in args.repeat:
            ticks = round(SECONDS * STEP_HZ / repeat)
            env = MetaWorldEnv(task, task, cameras=(), repeat=repeat, max_ticks=ticks)
            for ours in (True, False) if env.has_own_operator else (False,):
                for condition, (disturbance, wanders) in CONDITIONS.items():
                    results = episodes(env, ours, disturbance, wanders, args.episodes)
                    row = {
                        "task": task,
                        "repeat": repeat,
                        "operator": "ours" if ours else "Meta-World's",
                        "condition": condition,
                        "success_rate": round(statistics.mean(success for success, _ in results), 3),
                        "ticks": statistics.median(ticks for _, ticks in results),
                        "episodes": args.episodes,
                    }
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
