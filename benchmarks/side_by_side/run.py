#!/usr/bin/env python
"""Ours beside LeRobot's SAC actor and learner on gym-hil's PandaPickCube: one run, its rows appended to a file.

    python benchmarks/side_by_side/run.py lerobot --observation state  --env-steps 12000 --seed 0
    python benchmarks/side_by_side/run.py ours    --observation images --env-steps 12000 --seed 0 [algo=…]

Both get the same demonstrations, scripted operator, environment steps and evaluation episodes. Rows are those of
benchmarks/learning.py, whose --plot draws them; `minutes` is wall time here, `cpu_minutes` that of all processes, both
from the command's start, with evaluations left out. Run one at a time: each takes up to two cores.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and str(BENCHMARKS) not in sys.path:  # a script finds neither its own folder nor lockstep.py
    paths = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, [sys.executable, "-P", *sys.argv], {**os.environ, "PYTHONPATH": paths})

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> int:
    """Exit 0; 1 with a message when a process of the run ended early."""
    args, words = _arguments()
    from side_by_side.side_task import Settings

    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    output = args.output or BENCHMARKS.parent / "docs" / "results" / f"side_by_side_{args.observation}.jsonl"
    policy = "gaussian_actor" if args.side == "lerobot" else args.policy
    head = {"algo": _algo(args, words), "policy": policy, "task": settings.task, "seed": args.seed, "words": words}
    try:
        for row in _rows(args, words, settings):
            line = json.dumps(head | row)
            print(line, flush=True)
            with output.open("a") as file:
                file.write(line + "\n")
    except RuntimeError as error:
        print(f"side_by_side: {error}", file=sys.stderr)
        return 1
    return 0


def _rows(args: argparse.Namespace, words: list[str], settings: Any) -> Iterator[dict]:
    """Rows `before`, `curve`, `after` as they come."""
    if args.side == "lerobot":
        from side_by_side import lerobot_side

        yield from lerobot_side.run(settings, args.fps, args.keep)
        return
    from lockstep import opened

    names = ("demos", "env_steps", "eval_episodes", "curve_every", "curve_episodes", "clone_steps", "steps_per_tick")
    budget = [f"budget.{name}={getattr(args, name)}" for name in names]
    with opened([f"task={settings.task}", f"seed={args.seed}", f"policy={args.policy}", *budget, *words]) as run:
        for row in run.rows():
            wall = row.pop("wall_minutes")
            yield row | {"cpu_minutes": row["minutes"], "minutes": wall}


def _algo(args: argparse.Namespace, words: list[str]) -> str:
    if args.side == "lerobot":
        return f"lerobot_sac_{args.fps}hz"
    chosen = [word.partition("=")[2] for word in words if word.startswith("algo=")]
    return chosen[-1] if chosen else "reject_sampling_pi0"


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "lerobot"])
    parser.add_argument("--observation", choices=["state", "images"], default="state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--env-steps", type=int, default=12_000, help="online control ticks")
    parser.add_argument("--demos", type=int, default=10)
    parser.add_argument("--eval-episodes", type=int, default=60)
    parser.add_argument("--curve-every", type=int, default=1_500, help="online ticks between points; 0: none")
    parser.add_argument("--curve-episodes", type=int, default=30)
    parser.add_argument("--output", type=Path, help="default docs/results/side_by_side_<observation>.jsonl")
    parser.add_argument("--fps", type=int, default=10, help="lerobot: control ticks per second; 10 is its recipe's")
    parser.add_argument("--keep", type=Path, help="lerobot: a new folder for its logs, configuration and snapshots")
    parser.add_argument("--policy", default="pi0_tiny", help="ours")
    parser.add_argument("--clone-steps", type=int, default=600, help="ours: optimizer steps on the demonstrations")
    parser.add_argument("--steps-per-tick", type=float, default=0.25, help="ours: optimizer steps per online tick")
    args, words = parser.parse_known_args()
    if wrong := [word for word in words if "=" not in word or word.startswith("-")]:
        parser.error(f"expected key=value, got {wrong[0]!r}")
    if args.side == "lerobot" and words:
        parser.error(f"lerobot takes no overrides, got {words[0]!r}")
    return args, words


if __name__ == "__main__":
    sys.exit(main())
