"""Run a module whose life is tied to its parent's: `python -m serl_launcher.supervisor.lifeline <module> [args]`.

Each process of the trainer runs under one: when the supervisor, or supervisor.several, is killed, it must not go on
alone, and it is given the time to save.
"""

import os
import runpy
import signal
import sys
import threading
import time

from serl_config.process import die_with_parent

ORPHAN_GRACE_S = 10.0


def main(argv: list[str]) -> int:
    """Run `argv[0]` as __main__ with the rest as its arguments; returns its exit code."""
    parent = os.getppid()
    # SIGTERM, so that a trainer which saves on SIGTERM still may; the watch ends one that does not react.
    die_with_parent(parent, signal.SIGTERM)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    return _run(argv)


def _run(argv: list[str]) -> int:
    sys.argv = argv
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
