"""Demonstrations from elsewhere come in before the roles start: the importer as a child. Called by the learner's main.

It reads pictures with LeRobot's reader, which brings torch; this process stays free of it.
"""

import sys
import time

from serl_config.process import RestartBudget
from serl_launcher.run.paths import RunPaths
from serl_launcher.supervisor.children import Child, ChildSpec

GAVE_UP = 3
FINAL = (0, 2)  # exit codes after which it is not started again
LOOK_S = 0.1


def import_demos(paths: RunPaths) -> int:
    """0 when everything is in the journal, 2 a mistake of the user (it said so), 3 when the importer keeps dying.

    KeyboardInterrupt ends it; what is in the journal stays, and the next start goes on.
    """
    argv = (sys.executable, "-m", "serl_launcher.importer", str(paths.root))
    child = Child(ChildSpec("demos", argv, env={"PYTHONUNBUFFERED": "1"}))
    budget = RestartBudget()
    child.start()
    try:
        while True:
            time.sleep(LOOK_S)
            if (death := child.poll()) is None:
                continue
            if death.code in FINAL:
                return death.code
            if (wait_s := budget.died(death)) is None:
                print(f"demos: the import keeps dying ({death.cause}); giving up", file=sys.stderr)
                return GAVE_UP
            print(f"demos: the import ended ({death.cause}); starting it again in {wait_s:g} s", flush=True)
            time.sleep(wait_s)
            child.start()
    finally:
        child.stop()
