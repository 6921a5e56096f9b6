"""A side (the actor or the learner) as a child that is kept alive, and its output as prefixed lines.

Used by start.py: both sides in one process (foreground), or one side in each tmux pane; by keep.py: run_actor.sh.
"""

import contextlib
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from serl_config.process import Death, Process, ProcessSpec, RestartBudget, is_stopped

USER_MISTAKE, GAVE_UP = 2, 3
COLOURS = {"actor": "\x1b[36m", "learner": "\x1b[33m"}
# 0 finished, 2 the user must change something, 3 the supervisor gave up, 128 + n somebody stopped it in an orderly way.
FINAL_CODES = (0, USER_MISTAKE, GAVE_UP, 128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Stopper:
    """The stop signals that came, SIGHUP unless it is ignored (nohup); `more`: others that are wanted as well."""

    def __init__(self, *more: signal.Signals) -> None:
        self.came: list[signal.Signals] = []
        hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
        for signum in (signal.SIGINT, signal.SIGTERM, *hangup, *more):
            signal.signal(signum, self._note)

    @property
    def signum(self) -> int | None:
        """The last one."""
        return self.came[-1] if self.came else None

    def _note(self, signum: int, _frame: object) -> None:
        self.came.append(signal.Signals(signum))


class Side:
    """The process of one side, `actor` or `learner`: started, watched, started again when it crashes.

    label: what its lines begin with; None: its side. root: the checkout. prefixed: its lines get `[label]` in front;
    otherwise our terminal is its own: it writes there, and the actor reads its keys (e-stop, operator, verdict).
    """

    def __init__(
        self, name: str, overrides: Sequence[str], root: Path, prefixed: bool, label: str | None = None
    ) -> None:
        argv = (sys.executable, str(root / "examples" / "train_rlpd.py"), f"{name}=true", *overrides)
        # It gets SIGTERM when we die, however we die, and then ends in an orderly way by itself.
        env = {"PYTHONUNBUFFERED": "1"}
        self.name, self.label = name, label or name
        self.final: int | None = None  # its exit code once it is over for good
        self._process = Process(ProcessSpec(self.label, argv, env, grace_s=GRACE_S[name], orphan_signal=signal.SIGTERM))
        self._budget = RestartBudget()
        self._prefixed = prefixed
        self._pump: threading.Thread | None = None
        self._restart_at: float | None = None
        self._leave_by: float | None = None  # a signal that ends it was passed on
        self._stopped = False  # by a signal, as far as was told
        self._crashed = False  # it has been started again since
        self._worked = False  # it ran for a minute once
        self._terminal: list | None = None  # the mode that it finds

    def start(self) -> None:
        """Spawn the process."""
        # A shared window's keys are the shell's: whoever sends us to the background would lose them to the actor.
        keys = self.name == "actor" and not self._prefixed and _keys_are_ours()
        self._terminal = _terminal_mode() if keys else None
        stdout = subprocess.PIPE if self._prefixed else None
        process = self._process.start(stdout, None if keys else subprocess.DEVNULL)
        if self._prefixed:
            self._pump = threading.Thread(target=pump, args=(process.stdout, self.label), daemon=True)
            self._pump.start()

    def tick(self) -> int | None:
        """Look after it; its final exit code once it is over."""
        if self.final is not None:
            return self.final
        if self._restart_at is not None:
            if time.monotonic() >= self._restart_at:
                self._restart_at = None
                self.start()
        elif death := self._process.poll():
            self._drain()
            if self._terminal:  # one that was killed left its own mode
                with contextlib.suppress(termios.error):  # the terminal was closed
                    termios.tcsetattr(0, termios.TCSADRAIN, self._terminal)
            self._after(death)
        elif self._leave_by is not None and time.monotonic() >= self._leave_by:
            say(self.label, f"the {self.name} does not end; killing it")
            self.stop()
        self._tell_stopped()
        return self.final

    def _after(self, death: Death) -> None:
        """Plan the next start, or end for good.

        What ran for a minute is never given up: a camera that is unplugged at night may be there again in the morning.
        Nor is what it says of its parts at the next start a mistake of the user.
        """
        crashed, self._crashed = self._crashed, True
        self._worked = self._worked or death.ready
        if self._leave_by is not None:
            self.final = death.code if death.code >= 0 else 128 - death.code
            return
        if death.code in FINAL_CODES and not (death.code == USER_MISTAKE and crashed and self.name == "actor"):
            self.final = death.code
            return
        wait_s = self._budget.wait_s(death.lived_s) if self._worked else self._budget.died(death)
        if wait_s is None:
            say(self.label, f"the {self.name} keeps dying ({death.cause}); giving up")
            self.final = USER_MISTAKE if death.code == USER_MISTAKE else GAVE_UP
            return
        say(self.label, f"the {self.name} ended ({death.cause}); starting it again in {wait_s:g} s")
        self._restart_at = time.monotonic() + wait_s

    def _tell_stopped(self) -> None:
        """A side that somebody stopped is left alone: a robot's must not start by itself, a learner's roles go on."""
        pid = self._process.pid
        stopped = pid is not None and is_stopped(pid)
        if stopped and not self._stopped:
            say(self.label, f"the {self.name} is stopped (SIGSTOP); it goes on after: kill -CONT {pid}")
        self._stopped = stopped

    def pass_on(self, signum: signal.Signals) -> None:
        """What came to us is meant for it: SIGUSR1 is the actor's e-stop, others end it; GRACE_S later it is killed.

        While it waits for its next start that start is called off.
        """
        if self._restart_at is not None:
            self.final = 128 + signum
            return
        if signum != signal.SIGUSR1 and self._leave_by is None:
            self._leave_by = time.monotonic() + GRACE_S[self.name]
        self._process.send(signal.SIGTERM if signum == signal.SIGHUP else signum)

    def stop(self) -> None:
        """End it in an orderly way; `final` is set when it was still running."""
        self._process.stop()
        self._drain()
        if self.final is None:
            self.final = 128 + signal.SIGTERM

    def _drain(self) -> None:
        if self._pump:
            self._pump.join(timeout=2.0)


def keep(side: Side, stopper: Stopper) -> int:
    """One side on our terminal, until it is over for good; its exit code.

    Signals go on to it as they come: a second Ctrl-C interrupts an actor that still delivers.
    """
    side.start()
    passed = 0
    while side.tick() is None:
        for signum in stopper.came[passed:]:
            passed += 1
            side.pass_on(signum)
        time.sleep(0.1)
    assert side.final is not None
    return side.final


def _keys_are_ours() -> bool:
    """Not in a background job, whose terminal's user types to somebody else."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # no terminal, or one that is not our session's
        return True


def _terminal_mode() -> list | None:
    try:
        return termios.tcgetattr(0)
    except termios.error:
        return None


# The learner's roles write out what they hold; see the supervisor.
GRACE_S = {"actor": 40.0, "learner": 170.0}
_print_lock = threading.Lock()


def say(name: str, text: str) -> None:
    """One prefixed line."""
    prefix = f"[{name}]"
    if sys.stdout.isatty():
        prefix = f"{COLOURS.get(name, '')}{prefix}\x1b[0m"
    with _print_lock:
        print(f"{prefix} {text}", flush=True)


def pump(pipe: IO[bytes], name: str) -> None:
    """Prefix every line of `pipe` until it closes; a progress bar's carriage returns end lines as well."""
    lost = False
    for raw in pipe:
        if lost:
            continue
        try:
            for line in raw.decode(errors="replace").rstrip("\n").split("\r"):
                if line:
                    say(name, line)
        except BrokenPipeError:  # nobody reads us any more (start.sh | head): end the run, keep draining until it has
            lost = True
            os.kill(os.getpid(), signal.SIGTERM)
