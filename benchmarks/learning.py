"""The algorithms side by side: the same demonstrations, operator and steps per tick, each seed a process of its own.

    python benchmarks/learning.py --variants sft rejection sac dsrl_per_step --seeds 0 1 2 --jobs 2
    python benchmarks/learning.py --task metaworld --variants sft rejection --seeds 0 1 2
    python benchmarks/learning.py --plot docs/results/learning_pick.jsonl

Appends JSON rows to docs/results/learning_<task>.jsonl (`before`, `curve` and `after` of each run) and draws the curves
beside it, those of the ablations in a second picture. A run that is in the file already is not run again. Words with
`=` are overrides for every run, and are kept in its rows. How a run goes: benchmarks/lockstep.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

# In three of ten episodes the success key is pressed by mistake in the first 10 ticks; the quickest success takes 15.
MISTAKEN = [
    "reward._target_=mistakes.MistakenKey",
    *("+reward.probability=0.3", "+reward.within=10", "+reward.spared=10", "+reward.seed=${seed}"),
]
HESITANT = ["+task.operator.hesitation=8", "+task.operator.still_dims=[0,1,2]"]
# Variant -> words. `budget.x=y` sets a field of lockstep.Budget, the rest are overrides of the config.
VARIANTS: dict[str, list[str]] = {
    "sft": ["algo=sft_{policy}", "budget.offline_steps=3000"],  # and no online stage, whatever the budget says
    "rejection": ["algo=reject_sampling_{policy}"],
    "rejection_no_human": ["algo=reject_sampling_{policy}", "rollout.operator=false"],
    # A person needs a moment before moving: up to 8 ticks at the start of a demonstration and after taking over.
    "rejection_hesitant": ["algo=reject_sampling_{policy}", *HESITANT],
    "rejection_hesitant_no_noop_filter": ["algo=reject_sampling_{policy}", *HESITANT, "algo.rule.noop_threshold=-1"],
    "rejection_mistaken": ["algo=reject_sampling_{policy}", *MISTAKEN, "algo.rule.min_ticks=12"],
    "rejection_mistaken_no_short_filter": ["algo=reject_sampling_{policy}", *MISTAKEN, "algo.rule.min_ticks=0"],
    # Trained before: bash train_reward.sh run=<a finished run>; the evaluations count what the environment says.
    "rejection_classifier": ["algo=reject_sampling_{policy}", "reward=classifier", "reward.model=runs/reward"],
    "best_of_n": ["algo=best_of_n_{policy}"],
    "best_of_n_no_human": ["algo=best_of_n_{policy}", "rollout.operator=false"],
    "best_of_n_no_choice": ["algo=best_of_n_{policy}", "algo.served.candidates=1"],
    "advantage_weighted": ["algo=advantage_weighted_{policy}"],
    "advantage_weighted_no_human": ["algo=advantage_weighted_{policy}", "rollout.operator=false"],
    "advantage_weighted_no_value": ["algo=advantage_weighted_{policy}", "algo.agent.advantage_scale=1.0e6"],
    "sac": ["algo=sac_{policy}"],
    "sac_no_human": ["algo=sac_{policy}", "rollout.operator=false"],
    "dsrl_per_step": ["algo=dsrl_{policy}", "algo.served.variant=per_step"],
    "dsrl_tiled": ["algo=dsrl_{policy}", "algo.served.variant=tiled"],
}
ALGORITHMS = ("sft", "rejection", "sac", "dsrl_per_step", "dsrl_tiled")  # the other variants take something away


def words_of(variant: str, task: str, policy: str, seed: int, extra: Sequence[str]) -> list[str]:
    """All words of one run."""
    family = policy.split("_")[0]
    words = [word.replace("{policy}", family) for word in VARIANTS[variant]]
    offline = ["budget.env_steps=0"] if variant == "sft" else []
    return [f"task={task}", f"policy={policy}", f"seed={seed}", *words, *extra, *offline]


def one(variant: str, task: str, policy: str, seed: int, extra: Sequence[str]) -> None:
    """Run it here; rows go to stdout as they come."""
    from lockstep import opened

    head = {"algo": variant, "policy": policy, "task": task, "seed": seed, "words": list(extra)}
    started = time.monotonic()
    with opened(words_of(variant, task, policy, seed, extra)) as run:
        for row in run.rows():
            wall = {"wall_minutes": round((time.monotonic() - started) / 60, 2)}
            print(json.dumps(head | row | wall), flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; none when it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(
    wanted: Iterable[tuple[str, int]], task: str, policy: str, extra: Sequence[str], jobs: int, output: Path
) -> int:
    """Each (variant, seed) in a process, `jobs` at a time; a finished run's rows are appended at once."""
    after = [row for row in read_rows(output) if row["point"] == "after"]
    there = {(r["algo"], r["policy"], r["task"], r["seed"], tuple(r["words"])) for r in after}
    due = [run for run in wanted if (run[0], policy, task, run[1], tuple(extra)) not in there]

    def start(variant: str, seed: int) -> subprocess.CompletedProcess:
        words = ["--one", variant, str(seed), "--task", task, "--policy", policy, *extra]
        return subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)

    failures, pool = 0, ThreadPoolExecutor(jobs)
    try:
        runs = {pool.submit(start, *run): run for run in due}
        for done in as_completed(runs):
            (variant, seed), process = runs[done], done.result()
            if process.returncode:
                failures += 1
                print(f"{variant} seed {seed}: exit {process.returncode}", file=sys.stderr, flush=True)
                continue
            with output.open("a") as file:
                file.write(process.stdout)
            last = json.loads(process.stdout.splitlines()[-1])
            print(f"{variant} seed {seed}: {last['success_rate']:.2f} after {last['env_steps']} ticks", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C begins no further run
    return failures


def label_of(row: dict[str, Any]) -> str:
    """What seeds of one line in the table and one curve share: the algo and the words that change what is learned."""
    return " ".join([row["algo"], *(word for word in row["words"] if not word.startswith("budget.curve_"))])


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each algo, under the same words: medians over its seeds, before and after."""
    table = []
    for label in dict.fromkeys(map(label_of, rows)):
        mine = {p: [r for r in rows if label_of(r) == label and r["point"] == p] for p in ("before", "after")}
        if not mine["after"]:
            continue
        table.append(
            {
                "algo": label,
                "seeds": sorted(r["seed"] for r in mine["after"]),
                "before": statistics.median(r["success_rate"] for r in mine["before"]),
                "after": statistics.median(r["success_rate"] for r in mine["after"]),
                "each": [r["success_rate"] for r in sorted(mine["after"], key=lambda r: r["seed"])],
                "env_steps": statistics.median(r["env_steps"] for r in mine["after"]),
                "interventions": statistics.median(r["interventions"] for r in mine["after"]),
                "minutes": round(statistics.median(r["minutes"] for r in mine["after"]), 2),
                "help": help_rates([r for r in rows if label_of(r) == label]),
            }
        )
    return table


def help_rates(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Share of episodes with help in the first and in the last quarter of the online ticks: the seeds' medians.

    A quarter ends at the nearest point of the curve that is no shorter. None without an online stage.
    """
    rates = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed and row["point"] == "curve"]
        points = [(0, 0, 0), *((row["env_steps"], row["episodes"], row["interventions"]) for row in mine)]
        end = points[-1]
        first = next(p for p in points if p[0] >= 0.24 * end[0])
        last = [p for p in points if p[0] <= 0.76 * end[0]][-1]
        if first[1] and end[1] > last[1]:
            rates.append((first[2] / first[1], (end[2] - last[2]) / (end[1] - last[1])))
    return tuple(round(statistics.median(part), 2) for part in zip(*rates, strict=True)) or None


def pictures(rows: list[dict[str, Any]], output: Path) -> dict[Path, list[dict[str, Any]]]:
    """Which rows are drawn where: the algorithms in one picture, ablations and plain rejection sampling in another."""
    ablations = set(VARIANTS) - set(ALGORITHMS)
    taken_away = [row for row in rows if row["algo"] in ablations]
    others = [row for row in rows if row["algo"] not in ablations]
    drawn = {output.with_suffix(".png"): others} if others else {}
    if taken_away:
        whole = [row for row in rows if label_of(row) == "rejection"]
        drawn[output.with_name(f"{output.stem}_ablations.png")] = whole + taken_away
    return drawn


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Success over environment steps and over minutes of one core, intervention rate over steps: median and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Rows of the side-by-side runs tell both, and their minutes are the clock's.
    kind = "minutes of wall time" if any("cpu_minutes" in row for row in rows) else "minutes of one core"
    panels = (
        ("env_steps", "success_rate", "online control ticks", "success without help"),
        ("minutes", "success_rate", f"{kind} (evaluations left out)", "success without help"),
        ("env_steps", "recent_intervention_rate", "online control ticks", "share of the last 50 episodes with help"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 5.5), layout="constrained")
    for number, label in enumerate(dict.fromkeys(map(label_of, rows))):
        style = {"color": f"C{number}", "linestyle": "-" if number < 10 else "--"}  # there are ten colours
        for axis, (x, y, _, _) in zip(axes, panels, strict=True):
            curves = curves_of([r for r in rows if label_of(r) == label and r.get(y) is not None], x, y)
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), **style, alpha=0.25, linewidth=1)
            middle = median_curve(curves)
            if middle:
                axis.plot(*zip(*middle, strict=True), **style, linewidth=2, marker="o", ms=4, label=label)
    for axis, (_, _, xlabel, ylabel) in zip(axes, panels, strict=True):
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize="small")
    task, policies = rows[0]["task"], " and ".join(dict.fromkeys(row["policy"] for row in rows))
    figure.suptitle(f"{task}, {policies}: thick the median over seeds, thin each seed")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def curves_of(rows: list[dict[str, Any]], x: str, y: str) -> list[list[tuple[float, float]]]:
    """(x, y) of each seed, in the order in which they were measured."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [[(row[x], row[y]) for row in rows if row["seed"] == seed] for seed in seeds]


def median_curve(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The seeds' median at the points of the seed with the fewest, as far as every seed has come.

    Between its points a seed is taken to be on the straight line; of two at the same place the later one counts.
    """
    import numpy as np  # after OMP_NUM_THREADS is set

    seeds = [sorted(dict(curve).items()) for curve in curves if curve]
    if not seeds:
        return []
    end = min(seed[-1][0] for seed in seeds)
    places = sorted({min(x, end) for x, _ in min(seeds, key=len)})
    values = [[np.interp(place, *zip(*seed, strict=True)) for seed in seeds] for place in places]
    return [(place, float(statistics.median(at))) for place, at in zip(places, values, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["sft", "rejection", "sac", "dsrl_per_step"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--task", default="pick")
    parser.add_argument("--policy", default="pi0_tiny")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each takes one core")
    parser.add_argument("--output", type=Path, help="default docs/results/learning_<task>.jsonl")
    parser.add_argument("--plot", type=Path, metavar="ROWS", help="only draw these rows")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    extra = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    args = parser.parse_args([word for word in sys.argv[1:] if word not in extra])
    if args.one:
        one(args.one[0], args.task, args.policy, int(args.one[1]), extra)
        return 0
    output = args.plot or args.output or RESULTS / f"learning_{args.task}.jsonl"
    failures = 0
    if not args.plot:
        wanted = [(variant, seed) for seed in args.seeds for variant in args.variants]
        failures = run_all(wanted, args.task, args.policy, extra, args.jobs, output)
    rows = read_rows(output)
    for line in medians(rows):
        print(json.dumps(line))
    for picture, drawn in pictures(rows, output).items():
        draw(drawn, picture)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
