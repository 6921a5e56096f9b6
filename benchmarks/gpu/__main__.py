"""Every GPU figure of this project in minutes: stages one after another, rows on disk as they come, a table at the end.

    bash benchmarks/gpu.sh OUT [--short] [--budget SECONDS] [--only pi0,swap] [--rehearse]

gpu.sh calls it with the packages that the host lacks on its path. OUT gets results.jsonl (a row a figure), log.txt
(what the stages printed) and table.txt. Exits 0 when all that was run went through, 1 when something did not, 2 on a
mistake. Imports nothing that is not in Python: it outlives whatever the stages do.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gpu.schedule import Process, Stage, append, read, run_stages
from gpu.table import table

# The surest first; seconds as expected on an H100.
STAGES = (
    Stage("machine", 20, 60, "versions, imports, the card, its rates"),
    Stage("tests", 40, 150, "the tests that need a card"),
    Stage("pi0", 40, 110, "PI0, random, released size: by a graph, compiled, profiles"),
    Stage("groot", 40, 110, "GR00T N1.7 the same"),
    Stage("expert_step", 35, 90, "PI0's expert-only step at batch 32: time, waits for the device, memory"),
    Stage("swap", 35, 70, "answers while 1.2 GB of parameters are swapped in"),
    Stage("batch32", 40, 80, "32 answers together"),
    Stage("full_step", 35, 80, "PI0's full step at batch 32, checkpointed"),
    Stage("pi05", 40, 100, "PI0.5 served"),
    Stage("groot_step", 35, 70, "GR00T's action head at batch 32"),
    Stage("noise_step", 35, 70, "the expert-only step with 4 noise samples an observation"),
)
SHORT = ("machine", "pi0", "groot", "expert_step", "swap")
BUDGET_S, SHORT_S, REHEARSAL_S = 480.0, 240.0, 1800.0
SLOWER = 10  # a rehearsal's stages have so many times as long: a shared CPU imports for half a minute


def chosen(args: argparse.Namespace) -> list[Stage]:
    """The stages that were asked for, in their order. ValueError for a name that is none."""
    names = args.only.split(",") if args.only else SHORT if args.short else [stage.name for stage in STAGES]
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    found = [stage for stage in STAGES if stage.name in names]
    if args.rehearse:
        found = [Stage(s.name, 0, s.limit * SLOWER, s.what) for s in found]
    return found


@contextmanager
def forecasts(command: list[str], results: Path, log: IO[str], deadline: float) -> Iterator[None]:
    """Meanwhile a process beside the stages counts what they will cost; it sees no card."""
    process = Process(command, log, {"CUDA_VISIBLE_DEVICES": ""})
    try:
        yield
        ended = process.outcome(deadline - time.monotonic())
        append(results, {"stage": "forecast", "ended": ended, "seconds": round(process.seconds, 1)})
    finally:
        process.end()


def measure(args: argparse.Namespace) -> bool:
    """Run the stages; False when something failed."""
    results, size = args.out / "results.jsonl", "tiny" if args.rehearse else "released"
    deadline = time.monotonic() + args.budget

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "gpu.stage", name, "--size", size, "--results", str(results)]

    with (args.out / "log.txt").open("w") as log:
        with forecasts(command("forecast"), results, log, deadline):
            good = run_stages(chosen(args), command, results, log, deadline, say=lambda s: print(s, flush=True))
    return good and read(results)[-1]["ended"] == "ok"


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for results.jsonl, log.txt, table.txt; made anew")
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, in 4 minutes: after a fix")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all of it (default 480; --short: 240)")
    parser.add_argument("--only", metavar="A,B", help=f"some of {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: every stage's code, no figure")
    args = parser.parse_args(argv)
    if args.budget is None:
        args.budget = REHEARSAL_S if args.rehearse else SHORT_S if args.short else BUDGET_S
    try:
        chosen(args)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.jsonl").write_text("")
    except (ValueError, OSError) as mistake:
        print(f"gpu.sh: {mistake}", file=sys.stderr)
        return 2
    good = False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its processes end with it
    try:
        good = measure(args)
    finally:
        lines = table(read(args.out / "results.jsonl"))
        (args.out / "table.txt").write_text("\n".join(lines) + "\n")
        print(*lines, sep="\n", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
