"""How a role tells the supervisor that it is up: it removes the file that was laid out at its start.

    supervisor: logs/<role>.starting ─▶ process ─▶ say_ready() removes it       there when it dies: never up

Removing needs no space, so a full disk makes no role look as if it had never come up. Torch-free.
"""

import os
from pathlib import Path

from serl_launcher.run.alive import beat

STARTING_FILE = "FLOWSERL_STARTING_FILE"  # names the file in the role's environment


def say_ready() -> None:
    """This process does its work from now on. May be said again; without a supervisor nobody listens."""
    if path := os.environ.get(STARTING_FILE):
        Path(path).unlink(missing_ok=True)
    beat()  # from here on silence is noticed
