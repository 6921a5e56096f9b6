"""One process group and when to start it again: the shared ground of run_actor.sh, start.sh and the supervisor.

    Process.start ─▶ own session, dies with us ─▶ poll ─▶ Death ─▶ RestartBudget.died ─▶ wait_s | None

A process stands for its whole group: `stop` ends every member of it, its children's children included. Start them from
the main thread: the kernel's parent-death signal follows the thread that forked.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

READY_AFTER_S = 60.0  # for a process that cannot say so itself
LEFTOVER_GRACE_S = 15.0  # for what a dead leader left in its group
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run and how it ends."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # on top of ours
    grace_s: float = 10.0  # between SIGTERM and SIGKILL
    orphan_signal: signal.Signals = signal.SIGKILL  # what it gets when we die


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended."""

    name: str
    code: int  # exit code; negative: the signal
    lived_s: float
    ready: bool  # had it come up?

    @property
    def cause(self) -> str:
        """`exit code 3` or `signal SIGKILL`."""
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"signal {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"


class RestartBudget:
    """When to start again, and when to give up.

    Given up is what died `deaths` times in a row before it was ready. What was ready comes back however often it dies:
    the wait doubles with each death within `window_s` of its start, up to `longest_wait_s`, and is short again after a
    life that was longer.
    """

    def __init__(
        self, deaths: int = 5, window_s: float = 60.0, first_wait_s: float = 0.5, longest_wait_s: float = 60.0
    ) -> None:
        self._deaths, self._window_s = deaths, window_s
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._never_ready = 0  # deaths in a row before it was ready
        self.in_a_row = 0  # deaths in a row within the window

    def died(self, death: Death) -> float | None:
        """Seconds to wait before the next start; None: give up."""
        self._never_ready = 0 if death.ready else self._never_ready + 1
        wait_s = self.wait_s(death.lived_s)
        return None if self._never_ready >= self._deaths else wait_s

    def wait_s(self, lived_s: float) -> float:
        """The same for what is never given up."""
        self.in_a_row = 1 if lived_s >= self._window_s else self.in_a_row + 1
        return min(self._longest_wait_s, self._first_wait_s * 2 ** min(self.in_a_row - 1, 16))


class Process:
    """One process group started from a spec; may be started again after its death."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen | None = None
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        """Of the group's leader while it runs or is not yet reaped."""
        return self._process.pid if self._process else None

    def start(self, stdout: int | IO | None = None, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen:
        """Spawn it; `stdout`, which takes stderr too, and `stdin` are Popen arguments. OSError: the system refuses."""
        parent, signum = os.getpid(), self.spec.orphan_signal
        self._process = subprocess.Popen(
            self.spec.argv,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT if stdout else None,
            env={**os.environ, **self.spec.env, **self._more_env()},
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent, signum),
        )
        self._started = time.monotonic()
        return self._process

    def _more_env(self) -> Mapping[str, str]:
        """Of this start."""
        return {}

    def poll(self) -> Death | None:
        """Its death, once; None while it runs or before it was started."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        pid, self._process = self._process.pid, None
        # What the leader left behind must not meet its successor.
        end_group(pid, min(self.spec.grace_s, LEFTOVER_GRACE_S))
        return Death(self.spec.name, code, self.lived_s, self.ready)

    @property
    def ready(self) -> bool:
        """Has it come up since its start? It counts as ready after a minute."""
        return self.lived_s >= READY_AFTER_S

    @property
    def lived_s(self) -> float:
        """Since its start."""
        return time.monotonic() - self._started

    def send(self, signum: signal.Signals) -> None:
        """Pass a signal on to its leader, also to one that is stopped."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signum)
                os.kill(self._process.pid, signal.SIGCONT)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End the whole group: SIGTERM, wait (not when `hurry` says so), SIGKILL. Returns when no member is left."""
        if self._process is None:
            return
        process, self._process = self._process, None
        end_group(process.pid, self.spec.grace_s, process, hurry)
        process.wait()


def die_with_parent(parent: int, signum: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to this process when its parent, process `parent`, is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signum)


def group_members(group: int) -> list[int]:
    """Live processes of a process group; zombies do not count."""
    return [pid for pid, state, its_group in _processes() if its_group == group and state not in "ZX"]


def is_stopped(pid: int) -> bool:
    """Has a signal stopped this process?"""
    return process_stat(pid)[:1] == ["T"]


def stopped_groups() -> set[int]:
    """Process groups of which a signal has stopped a member (Ctrl-Z, SIGSTOP; not a debugger)."""
    return {group for _, state, group in _processes() if state == "T"}


def _processes() -> Iterator[tuple[int, str, int]]:
    """(pid, state, process group) of everything that runs."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := process_stat(int(entry.name))):
            yield int(entry.name), fields[0], int(fields[2])


def process_stat(pid: int) -> Sequence[str]:
    """Fields of /proc/<pid>/stat from the state on (state, ppid, pgrp, …, [19] start time); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ()


def end_group(
    group: int,
    grace_s: float,
    leader: subprocess.Popen | None = None,
    hurry: Callable[[], bool] = lambda: False,
) -> None:
    """SIGTERM, wait until no member is left, SIGKILL after `grace_s` or when `hurry` says so."""
    for signum, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        if not group_members(group):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signum)
            os.killpg(group, signal.SIGCONT)  # a stopped one takes no other signal
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not (signum == signal.SIGTERM and hurry()):
            if leader:
                leader.poll()  # reaps
            if not group_members(group):
                return
            time.sleep(0.05)
