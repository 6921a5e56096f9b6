"""run_actor.sh and run_learner.sh behind the bootstrap: a side on this terminal, started again when it dies.

    run_<side>.sh ─▶ keep ─▶ examples/train_rlpd.py <side>=true, in a session of its own
                       └ Ctrl-C, SIGTERM, SIGHUP, an actor's SIGUSR1 ─▶ passed on; the first three end it for good

A run that is over, a mistake of the user and a stop by a person end it, with the side's exit code; whatever else ends
the side (kill -9, a driver that fails, a camera that is gone, no memory) starts it again, as start.sh does (sides.py).
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from flowserl_cli.sides import Side, Stopper, keep


def main(argv: Sequence[str]) -> int:
    """Keep a side, `actor` or `learner`, of these words; its exit code."""
    name, *words = argv
    signal.signal(signal.SIGTSTP, _refuse)
    stopper = Stopper(signal.SIGUSR1) if name == "actor" else Stopper()
    return keep(Side(name, words, Path.cwd(), prefixed=False), stopper)


def _refuse(_signum: int, _frame: object) -> None:
    """Ctrl-Z would stop us and leave the robot moving. Not by print, which may be at work."""
    os.write(1, b"Ctrl-Z is not taken, since the robot or the training would go on; Ctrl-C ends it\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
