#!/usr/bin/env python
"""Benchmarks: `python benchmarks/run.py transport params [--quick]` prints one JSON row a line.

Each suite is one file in suites/ with `rows(quick) -> Iterator[Row]`. Rows: name, value, unit, floor (the barest way to
do the same, measured in the same run), ratio, goal, holds. Quote figures from a quiet machine only.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from serl_config.nearest import nearest

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent


def suite_names() -> list[str]:
    """What can be asked for."""
    return sorted(path.stem for path in (HERE / "suites").glob("*.py") if not path.stem.startswith("_"))


def main(argv: list[str] | None = None) -> int:
    """Exit 0, 1 where a row could not be measured, 2 for a suite that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", metavar="suite", help=", ".join(suite_names()))
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows that it runs")
    parser.add_argument("--output", type=Path, help="write the rows to this file too")
    args = parser.parse_args(argv)
    for name in args.suites:
        if name not in suite_names():
            print(f"run.py: no suite {name!r}{nearest(name, suite_names())}", file=sys.stderr)
            return 2
    lines, failed = [], False
    for name in args.suites:
        for row in importlib.import_module(f"suites.{name}").rows(args.quick):
            print(row.to_json(), flush=True)
            lines.append(row.to_json() + "\n")
            failed = failed or row.value is None
    if args.output:
        args.output.write_text("".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
