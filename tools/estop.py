"""Press or reset the e-stop of a run's actors on this host: `python tools/estop.py runs/<run> [--key | --reset]`.

The file runs/<run>/estop is the latch (serl_robot_infra.estop): every actor of the run on this host looks at it within
each control period. With --key this terminal becomes the button: any key presses. SIGUSR1 to an actor's process, and
rollout.estop_key at its own terminal, press it too.
"""

import argparse
import getpass
import sys
import time
from pathlib import Path

from serl_robot_infra.keyboard import TerminalGoneError, terminal_reader


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: no such run folder, or no terminal for --key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="the run's folder on the robot's host")
    parser.add_argument("--reset", action="store_true", help="it is safe again: let the actors move")
    parser.add_argument("--key", action="store_true", help="wait here: any key presses it (Ctrl-C leaves)")
    options = parser.parse_args(argv)
    if not options.run_dir.is_dir():
        print(f"no run folder {options.run_dir}: expected runs/<run> of an actor on this host", file=sys.stderr)
        return 2
    latch = options.run_dir / "estop"
    if options.reset:
        latch.unlink(missing_ok=True)
        print("reset: the actors may move")
    elif options.key:
        return wait_for_keys(latch)
    else:
        press(latch)
    return 0


def press(latch: Path) -> None:
    """Latch it; the first press stays."""
    if not latch.exists():
        latch.write_text(f"{getpass.getuser()} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    print(f"stopped; reset with: python tools/estop.py {latch.parent} --reset", flush=True)


def wait_for_keys(latch: Path) -> int:
    """Press at every key until the terminal is closed or Ctrl-C."""
    if not sys.stdin.isatty():
        print("--key needs a terminal to press keys at", file=sys.stderr)
        return 2
    read = terminal_reader(sys.stdin.fileno())
    print(f"any key stops the robots of {latch.parent}; Ctrl-C leaves", flush=True)
    while True:
        try:
            if read() is not None:
                press(latch)
        except (TerminalGoneError, KeyboardInterrupt):
            return 0


if __name__ == "__main__":
    sys.exit(main())
