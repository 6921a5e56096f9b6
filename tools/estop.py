#!/usr/bin/env python3
"""Press or reset the e-stop of a run's actors on this host: `python3 tools/estop.py runs/<run> [--key | --reset]`.

The file runs/<run>/estop is the latch (serl_robot_infra.estop): every actor of the run on this host looks at it within
each control period. What each of them answers is told: stopped, or nothing within two seconds. With --key this
terminal becomes the button: any key presses. SIGUSR1 to an actor's process, and rollout.estop_key at its own terminal,
press it too.

It must work whatever is broken: any python3 from 3.7 on, its standard library alone, no environment, no other file of
this repository (so the few lines of serl_robot_infra.keyboard that it needs are here again).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import getpass
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.1
ANSWER_S = 2.0  # an actor has this long to say that it stopped


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
    with contextlib.suppress(FileExistsError):
        file = os.open(str(latch), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(file, f"{_user()} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            os.fsync(file)  # a power cut resets nothing
        finally:
            os.close(file)
        folder = os.open(str(latch.parent), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    print(f"pressed; reset with: python3 tools/estop.py {latch.parent} --reset", flush=True)
    for line in answers(latch):
        print(line, flush=True)


def answers(latch: Path) -> Iterator[str]:
    """A line for each actor of the run on this host: what it says to the press."""
    actors = [path for path in sorted(latch.with_name("estop.heard").glob("*")) if _is_alive(path)]
    if not actors:
        yield "no actor of this run is running on this host; one that is started does not move before the reset"
    deadline = time.monotonic() + ANSWER_S
    for path in actors:
        while "stopped" not in path.read_text() and _is_alive(path) and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
        said = path.read_text().split()
        if "stopped" in said:
            yield f"{path.name} (pid {said[1]}) has stopped"
        else:
            yield f"{path.name} DOES NOT ANSWER after {ANSWER_S:g} s: use the robot's own emergency stop"


def _is_alive(path: Path) -> bool:
    """An actor holds a lock on its file as long as it lives."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def wait_for_keys(latch: Path) -> int:
    """Press at every key until the terminal is closed or Ctrl-C."""
    if not sys.stdin.isatty():
        print("--key needs a terminal to press keys at", file=sys.stderr)
        return 2
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)  # without waiting for return
    print(f"any key stops the robots of {latch.parent}; Ctrl-C leaves", flush=True)
    try:
        while key_pressed(terminal):
            press(latch)
    except KeyboardInterrupt:
        pass
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone: its mode needs no restoring
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    return 0


def key_pressed(terminal: int) -> bool:
    """Wait for a key; False: the terminal was closed."""
    while True:
        if not _in_foreground(terminal):  # a background job that reads is stopped by the kernel
            time.sleep(POLL_S)
            continue
        try:
            ready, _, _ = select.select([terminal], [], [], POLL_S)
            if ready:
                return os.read(terminal, 1) != b""
        except OSError:
            return False


def _in_foreground(terminal: int) -> bool:
    """A terminal that is not our session's has no such notion."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


if __name__ == "__main__":
    sys.exit(main())
