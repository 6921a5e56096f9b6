"""`python -m serl_launcher.exporter <run_dir> [--once]`: the exporter as a process, started by the supervisor.

It runs at the lowest priority and stops on SIGTERM (after exporting all that is journalled) or when its parent is gone.
A disk that is full is waited for. Exit 2: it can never work; exit 1: another exporter is at work. One line says why.
`--once` exports what the journal holds and ends.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.exporter.video import wants_video
from serl_launcher.replay.durable import MARK_FILE, read_mark
from serl_launcher.replay.journal import JournalCorrupt, segment_numbers
from serl_launcher.run.config import read_config, task_spec
from serl_launcher.run.files import clear
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("exporter")
RETRY_S = 10.0


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop; the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m serl_launcher.exporter", description="Export a run to LeRobot.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--once", action="store_true", help="export what the journal holds now, then end")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s exporter %(levelname)s %(message)s")
    try:
        with _only_one(args.run_dir):
            _export(args.run_dir, args.once)
    except (JournalCorrupt, ValueError) as error:
        print(f"exporter: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        print(f"exporter: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def read_run(run_dir: Path) -> tuple[TaskSpec, ExporterOptions]:
    """Task and exporter options of a run's config.yaml. ValueError: no such file, or a key is missing or unknown."""
    path = run_dir / "config.yaml"
    config = read_config(path, "task.spec")
    try:
        return task_spec(config), ExporterOptions(**(config.get("exporter") or {}))
    except TypeError as error:
        raise ValueError(f"{path}: exporter: {error}") from None


def _export(run_dir: Path, once: bool) -> None:
    stop, parent = threading.Event(), os.getppid()
    for number in () if once else (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    spec, options = read_run(run_dir)
    video = wants_video(options.video, spec)
    journal = RunPaths(run_dir).journal
    if once and segment_numbers(journal) and read_mark(journal) is None:
        raise ValueError(f"{journal / MARK_FILE} is missing or damaged: start the learner once, it writes it anew")

    def stopping(seconds: float) -> bool:
        return once or stop.wait(seconds) or os.getppid() != parent

    while True:
        try:
            with contextlib.closing(Exporter(run_dir, spec, options, video)) as exporter:
                exporter.poll()
                say_ready()
                return exporter.run(stopping)
        except OSError as error:  # the dataset is recovered when it opens again, and the journal still has everything
            if stopping(0.0):
                raise
            log.warning("%s; trying again in %g s", error, RETRY_S)
            stopping(RETRY_S)  # told to end meanwhile: once more all the same, there may be room by now


@contextlib.contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Hold the run's export lock; the system lets go of it when the process dies."""
    path = run_dir / "dataset.lock"
    clear(path)
    try:
        lock = path.open("w")
    except FileNotFoundError:
        raise ValueError(f"{run_dir} does not exist: expected a run's folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another exporter is at work in {run_dir}; stop it first") from None
        yield


if __name__ == "__main__":
    os.nice(19)
    sys.exit(main())
