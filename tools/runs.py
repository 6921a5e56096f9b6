#!/usr/bin/env python
"""Which run did what: the list of runs, what one of them is made of, several beside each other.

    python tools/runs.py list [--runs-dir runs] [--json]     # a row per run; writes runs/index.jsonl anew
    python tools/runs.py show runs/night1                    # or a checkpoint, a params/ file, an export, a dataset
    python tools/runs.py compare runs/night1 runs/night2 [--png both.png]

`show` needs the thing itself and nothing else: a checkpoint or an export carries its record wherever it was copied.
Exit codes: 0 done, 2 a mistake, in one line.
"""

import needs_learner  # noqa: F401

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from serl_launcher.run.provenance import describe, find, when
from serl_launcher.telemetry.comparison import compare, draw, table
from serl_launcher.telemetry.registry import INDEX, refresh
from serl_transport.contract.bounds import printable

COLUMNS = ("run", "run_id", "started", "state", "task", "policy", "algo", "seed", "metric", "episodes", "steps", "code",
           "wandb_id")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The exit code; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="a row per run, oldest first")
    listing.add_argument("--runs-dir", type=Path, default=Path("runs"))
    listing.add_argument("--json", action="store_true", help="the rows of the index as they are")
    showing = commands.add_parser("show", help="which code, config, data, people and policy version made this")
    showing.add_argument("path", type=Path)
    showing.add_argument("--json", action="store_true", help="the whole record, config included")
    comparing = commands.add_parser("compare", help="what differs between runs, and how they went")
    comparing.add_argument("runs", type=Path, nargs="+")
    comparing.add_argument("--png", type=Path, metavar="FILE", help="their curves over each other")
    args = parser.parse_args(argv)
    try:
        lines = {"list": list_runs, "show": show, "compare": compare_runs}[args.command](args)
    except (ValueError, OSError) as mistake:
        print(f"runs: {printable(str(mistake))}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def list_runs(args: argparse.Namespace) -> list[str]:
    """The index as a table, made anew."""
    if not args.runs_dir.is_dir():
        raise ValueError(f"{args.runs_dir}: no such folder; --runs-dir names the folder of the runs")
    rows = refresh(args.runs_dir)
    if args.json:
        return [json.dumps(row) for row in rows]
    if not rows:
        return [f"no run in {args.runs_dir}"]
    cells = [[printable(cell(row, column)) for column in COLUMNS] for row in rows]
    problems = [f"{row['run']}: {row['problem']}" for row in rows if row.get("problem")]
    return [*table(COLUMNS, cells), *problems, f"{len(rows)} runs, {args.runs_dir / INDEX}"]


def cell(row: dict[str, Any], column: str) -> str:
    """One cell of the list."""
    match column:
        case "started":
            return when(row["started"])[:16]
        case "state":
            return "gone" if row.get("gone") else "unreadable" if row.get("problem") else _state(row)
        case "metric":
            return metric(row)
        case "code":
            changed = f"+{row['changed']}" if row.get("changed") else ""
            return f"{(row.get('commit') or row.get('code') or '-')[:10]}{changed}"
    value = row.get(column)
    return "-" if value is None else str(value)


def metric(row: dict[str, Any]) -> str:
    """The run's target metric: success of the last evaluation or of online episodes, or the lowest held-out loss."""
    if row.get("success_rate") is not None:
        low, high = row["success_rate_interval"]
        return f"{row['success_rate']:.2f} [{low:.2f}, {high:.2f}]"
    return f"loss {row['held_out_loss']:.4g}" if row.get("held_out_loss") is not None else "-"


def _state(row: dict[str, Any]) -> str:
    return "complete" if row.get("complete") else "open"


def show(args: argparse.Namespace) -> list[str]:
    """What one thing is made of."""
    found = find(args.path)
    if args.json:
        return [json.dumps({"what": found.what, "whole": found.whole, **found.origin}, indent=1)]
    return describe(found)


def compare_runs(args: argparse.Namespace) -> list[str]:
    """The differences, and the picture."""
    if len(args.runs) < 2:
        raise ValueError(f"compare: expected two runs or more, got {args.runs[0]} alone")
    for run in args.runs:
        if not (run / "config.yaml").is_file():
            raise ValueError(f"{run}: expected a run's folder, with a config.yaml")
    lines = compare(args.runs)
    if args.png:
        draw(args.runs, args.png)
        lines += ["", f"wrote {args.png}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
