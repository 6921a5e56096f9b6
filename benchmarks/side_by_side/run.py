#!/usr/bin/env python
"""Starts command.py, which says what it does, with benchmarks/ as a place to import from: this folder and lockstep.py.

python benchmarks/side_by_side/run.py ours|lerobot …
"""

import os
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    paths = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "side_by_side.command", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": paths})
