"""Imported first by the tools that need the learner's environment: on a robot host one line says so, exit 2."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("serl_launcher") is None:
    name = Path(sys.argv[0]).name
    print(
        f"{name}: this needs the learner's environment, and here is a robot host's: run it on the learner's host, "
        "where the run's folder is (or here, after bash tools/bootstrap.sh learner, 6 GB)",
        file=sys.stderr,
    )
    raise SystemExit(2)
