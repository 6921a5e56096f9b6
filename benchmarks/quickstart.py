"""The quick start, measured: each seed as `bash start.sh --no-tmux`, then what the compute gives without its parts.

    python benchmarks/quickstart.py --seeds 0 1 2 --variants full no_operator offline > quickstart.json

Runs real processes, one run after the other (each wants both cores); prints one JSON row a run, and medians at the end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANTS = {"full": [], "no_operator": ["rollout.operator=false"], "offline": ["schedule=quickstart_offline"]}
FIGURES = (
    "success_rate_before_online",
    "success_rate",
    "episodes",
    "accepted_episodes",
    "interventions",
    "transitions",
    "minutes",
    "policy_versions",
)


def run_once(variant: str, seed: int, extra: list[str]) -> dict:
    """One whole run in a folder of its own; the figures of its summary.json."""
    name = f"bench_{variant}_{seed}_{int(time.time())}"
    command = ["bash", "start.sh", "--no-tmux", f"run={name}", f"seed={seed}", *VARIANTS[variant], *extra]
    started = time.time()
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    row = {"name": f"quickstart/{variant}", "seed": seed, "run": name, "exit": finished.returncode}
    row["wall_minutes"] = round((time.time() - started) / 60, 2)
    summary = ROOT / "runs" / name / "summary.json"
    if not summary.exists():
        print(finished.stdout[-3000:], file=sys.stderr)
        return row
    figures = json.loads(summary.read_text())
    for stage in figures["stages"]:  # a run without an online stage has no "before online"
        if stage["name"] == "before" and figures.get("success_rate_before_online") is None:
            figures["success_rate_before_online"] = stage["success_rate"]
    return row | {key: figures.get(key) for key in FIGURES}


def medians(rows: list[dict]) -> dict:
    """Median success rates and minutes of a variant's seeds."""
    keys = ("success_rate_before_online", "success_rate", "minutes", "wall_minutes")
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {key: statistics.median(found) for key, found in values.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["full"])
    parser.add_argument("overrides", nargs="*", help="more overrides for every run")
    args = parser.parse_args()
    for variant in args.variants:
        rows = []
        for seed in args.seeds:
            rows.append(run_once(variant, seed, args.overrides))
            print(json.dumps(rows[-1]), flush=True)
        print(json.dumps({"name": f"quickstart/{variant}/median", **medians(rows)}), flush=True)


if __name__ == "__main__":
    main()
