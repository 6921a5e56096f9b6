"""What a page that is open at the console costs the robot: the control period at 50 Hz with it and without, in turns.

    actor (this process, the real one), three cameras ─▶ gateway process ◀─ _console_watcher.py, five times a second

The actor shrinks, encodes and sends its pictures only in the turns with a watcher, which asks the gateway as the
console's process does. Measured are the ticks within one chunk (`suites/control.py`), after the first two seconds: an
actor hears within one that somebody looks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rows import Row
from suites.control import CHUNK, SPEC, drive, start

HERE = Path(__file__).parent
HZ, DELAY_MS, SKIPPED_S = 50.0, 5.0, 2.0
CAMERAS = {"front": [240, 320], "wrist": [240, 320], "side": [240, 320]}


def rows(quick: bool) -> Iterator[Row]:
    """p99 of the period with a page over p99 without."""
    seconds, turns = (5.0, 1) if quick else (30.0, 4)
    gaps: dict[bool, list[np.ndarray]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, ExitStack() as stack:
        config = start(Path(folder), stack, SPEC | {"cameras": CAMERAS})
        for _ in range(turns):
            for watched in (False, True):
                gaps[watched].append(turn(config, Path(folder), seconds, watched))
    alone, watched = (float(np.percentile(np.concatenate(gaps[open_]), 99)) * 1e3 for open_ in (False, True))
    yield Row.of(f"console/{HZ:g} Hz, no page/p99", alone, "ms", 1e3 / HZ)
    yield Row.of(f"console/{HZ:g} Hz, a page is open/p99", watched, "ms", alone, "<= 1.02")


def turn(config: DictConfig, folder: Path, seconds: float, watched: bool) -> np.ndarray:
    """Seconds between two ticks of one chunk, of an episode that lasts for so long."""
    with ExitStack() as stack:
        if watched:
            watcher = subprocess.Popen([sys.executable, str(HERE / "_console_watcher.py"), str(folder / "control")])
            stack.callback(watcher.wait, 20)
            stack.callback(watcher.terminate)
        times = drive(config, HZ, DELAY_MS, CHUNK, CHUNK, "off", seconds)
    gaps = np.diff(times)
    within = np.arange(1, len(times)) % CHUNK != 0
    return gaps[within & (times[1:] > times[0] + SKIPPED_S)]
