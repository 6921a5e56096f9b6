"""run_actor.sh behind the bootstrap: the actor on this terminal, started again when it dies.

    run_actor.sh ─▶ keep ─▶ examples/train_rlpd.py actor=true, in a session of its own
                      └ Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 ─▶ passed on to it; the first three end it for good

A run that is over, a mistake of the user and a stop by a person end it, with the actor's exit code; whatever else ends
the actor (kill -9, a driver that fails, a camera that is gone) starts it again, as start.sh does (sides.py).
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from flowserl_cli.sides import Side, Stopper, keep


def main(argv: Sequence[str]) -> int:
    """Keep the actor of these words; its exit code."""
    signal.signal(signal.SIGTSTP, _refuse)
    return keep(Side("actor", argv, Path.cwd(), prefixed=False), Stopper(signal.SIGUSR1))


def _refuse(_signum: int, _frame: object) -> None:
    """Ctrl-Z would stop us and leave the robot moving. Not by print, which may be at work."""
    os.write(1, b"Ctrl-Z is not taken, since the robot would go on; Ctrl-C ends it\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
