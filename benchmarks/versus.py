"""Which of two ways to learn is better, from rows of learning.py with the same seeds: or that it cannot be told.

    python benchmarks/versus.py docs/results/learning_pick_state.jsonl rejection advantage_weighted
    python benchmarks/versus.py ROWS rejection best_of_n --measure success_rate --looks 3 5 10

Runs of one seed share demonstrations, operator and evaluation episodes, so the difference is taken seed by seed, and
its interval is Student's over the seeds: a seed is one trial, however many episodes it was evaluated on. Who looks
after 3 seeds, and again after 5 and 10 if it could not be told, names the looks: each is then held to its share of the
5% (Bonferroni), and stopping at the first that tells is sound. Prints one JSON line, the verdict in words with it.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learning import label_of, read_rows

MEASURES = ("per_1000_ticks", "success_rate", "ticks_to_success")
LESS_IS_BETTER = ("ticks_to_success",)
RISK = 0.05  # of a verdict where there is no difference, over all looks


def of_seeds(rows: Sequence[Mapping[str, Any]], name: str, measure: str) -> dict[int, float]:
    """The measure of each seed after learning. name: the algo, or the algo and the words that change what is learned.

    ValueError where rows of several kinds are called so, or one has no such figure.
    """
    mine = [row for row in rows if row["point"] == "after" and name in (row["algo"], label_of(row))]
    kinds = list(dict.fromkeys(map(label_of, mine)))
    if len(kinds) != 1:
        raise ValueError(f"{name}: expected rows of one kind, got {' | '.join(kinds) or 'none'}")
    lacking = [row["seed"] for row in mine if row.get(measure) is None]
    if lacking:
        raise ValueError(f"{name}: no {measure} of seed {lacking[0]}")
    return {row["seed"]: float(row[measure]) for row in mine}


def compare(
    one: Mapping[int, float], other: Mapping[int, float], *, looks: int = 1, less_is_better: bool = False
) -> dict[str, Any]:
    """`other` against `one`, by the seeds that both have: medians, worst seeds, the mean difference and its interval.

    looks: how often one means to look in all; each is held to RISK / looks. ValueError below two common seeds.
    """
    from scipy.stats import t

    seeds = sorted(set(one) & set(other))
    if len(seeds) < 2:
        raise ValueError(f"expected two seeds or more that both have, got {seeds}")
    differences = [other[seed] - one[seed] for seed in seeds]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    half = t.ppf(1 - RISK / looks / 2, len(seeds) - 1) * spread / math.sqrt(len(seeds))
    low, high = mean - half, mean + half
    told = "cannot tell" if low <= 0 <= high else "better" if (mean > 0) != less_is_better else "worse"
    worst = max if less_is_better else min
    return {
        "seeds": seeds,
        "medians": [statistics.median(found[seed] for seed in seeds) for found in (one, other)],
        "worst": [worst(found[seed] for seed in seeds) for found in (one, other)],
        "difference": round(mean, 4),
        "interval": [round(low, 4), round(high, 4)],
        "verdict": told,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("one")
    parser.add_argument("other")
    parser.add_argument("--measure", choices=MEASURES, default=MEASURES[0])
    parser.add_argument(
        "--looks", type=int, nargs="+", default=[], help="seeds at which one means to look, all of them"
    )
    args = parser.parse_args()
    try:
        one, other = (of_seeds(read_rows(args.rows), name, args.measure) for name in (args.one, args.other))
        found = compare(one, other, looks=max(1, len(args.looks)), less_is_better=args.measure in LESS_IS_BETTER)
    except ValueError as error:
        print(f"{args.rows}: {error}", file=sys.stderr)
        return 2
    later = [n for n in args.looks if n > len(found["seeds"])]
    if found["verdict"] != "cannot tell":
        found["verdict"] = f"{args.other} is {found['verdict']} than {args.one}"
    elif later:
        found["verdict"] += f"; look again at {later[0]} seeds"
    print(json.dumps({"measure": args.measure, "of": [args.one, args.other]} | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
