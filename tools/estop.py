"""Press or reset the e-stop of a run's actors on this host: `python tools/estop.py runs/<run> [--reset]`.

The file runs/<run>/estop is the latch (serl_robot_infra.estop): every actor of the run on this host looks at it each
control period. SIGUSR1 to an actor's process presses it too.
"""

import argparse
import getpass
import sys
import time
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: no such run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="the run's folder on the robot's host")
    parser.add_argument("--reset", action="store_true", help="it is safe again: let the actors move")
    options = parser.parse_args(argv)
    if not options.run_dir.is_dir():
        print(f"no run folder {options.run_dir}: expected runs/<run> of an actor on this host", file=sys.stderr)
        return 2
    latch = options.run_dir / "estop"
    if options.reset:
        latch.unlink(missing_ok=True)
        print("reset: the actors may move")
        return 0
    if not latch.exists():
        latch.write_text(f"{getpass.getuser()} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    print(f"stopped; reset with: python tools/estop.py {options.run_dir} --reset")
    return 0


if __name__ == "__main__":
    sys.exit(main())
