"""One stage in a process of its own: `python -m gpu.stage NAME --size tiny --results FILE`. gpu/__main__.py starts it.

Exits 0 when every part of it went through, else 1; its rows are in FILE as they came.
"""

from gpu.absent import leave_out

leave_out()

import argparse  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from gpu.cases import Bench  # noqa: E402
from gpu.device import Card, Host  # noqa: E402
from gpu.record import Record  # noqa: E402


def of(module: str, function: str, **given: Any) -> Callable[[Bench, Record], None]:
    """A stage; its module is imported when it runs, so that one that does not import stops no other stage."""
    return lambda bench, record: getattr(import_module(f"gpu.{module}"), function)(bench, record, **given)


STAGES = {
    "machine": of("machine", "look"),
    "forecast": of("machine", "forecast"),
    "tests": of("tests", "run"),
    "pi0": of("serving", "serve", case="pi0"),
    "groot": of("serving", "serve", case="groot"),
    "expert_step": of("training", "train", case="pi0", compile=("off", "on")),
    "swap": of("serving", "swap"),
    "batch32": of("serving", "serve", case="pi0_batch32", modes=("compiled",)),
    "noise_step": of("training", "train", case="pi0_noise4"),
    "full_step": of("training", "train", case="pi0_full"),
    "groot_step": of("training", "train", case="groot"),
    "pi05": of("serving", "serve", case="pi05"),
}


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--size", choices=("released", "tiny"), required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    record = Record(args.results, args.stage)
    if args.stage != "tests":  # which provoke what it warns of
        record.watch_log()
    device = Card() if args.size == "released" else Host()
    with tempfile.TemporaryDirectory() as folder, record.part(args.stage):
        STAGES[args.stage](Bench(args.size, device, Path(folder)), record)
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
