"""One child process and when to start it again: the shared ground of the supervisor (roles) and the launcher (sides).

    Child.start ─▶ own session, dies with us ─▶ poll ─▶ Death ─▶ RestartBudget.died ─▶ wait_s | None
         ├ starting file ─▶ removed by the child once it is up (run.ready)
         └ beats ◀─ its work loop (run.alive) ─▶ look ─▶ Silence ─▶ kill

A child is a whole process group: `stop` ends every member of it, its children's children included. Start children from
the main thread: the kernel's parent-death signal follows the thread that forked.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from serl_launcher.run.alive import BEAT_FILE, DUMP_SIGNAL
from serl_launcher.run.kin import die_with_parent
from serl_launcher.run.ready import STARTING_FILE
from serl_launcher.supervisor.pulse import Pulse, Silence

EndsRun = Literal["always", "until ready", "never"]
READY_AFTER_S = 60.0  # for a child that cannot say so itself
LEFTOVER_GRACE_S = 15.0  # for what a dead leader left in its group
DUMP_S = 3.0  # for a role that hangs to write down where


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run and how it ends."""

    name: str
    argv: tuple[str, ...]
    log: Path | None = None  # stdout and stderr are appended here; None: as `stdout` of `Child.start`
    env: Mapping[str, str] = field(default_factory=dict)  # on top of ours
    grace_s: float = 10.0  # between SIGTERM and SIGKILL
    orphan_signal: signal.Signals = signal.SIGKILL  # what it gets when we die
    exit_file: Path | None = None  # a wrapper writes the true exit code here when it cannot pass it on
    starting_file: Path | None = None  # exists from the start until the child says that it is ready (run.ready)
    beats: bool = False  # its work loop shows that it goes on (run.alive)
    ends_run: EndsRun = "always"  # may a mistake or repeated deaths of it end the run?


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended."""

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


class Child:
    """One process group started from a spec; may be started again after its death."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen | None = None
        self._pulse = Pulse()
        self._started = 0.0
        self._log_offset = 0

    @property
    def pid(self) -> int | None:
        """Of the group's leader while it runs or is not yet reaped."""
        return self._process.pid if self._process else None

    def start(self, stdout: int | None = None, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen:
        """Spawn it; `stdout` and `stdin` are Popen arguments, the former for a child without a log.

        OSError: the system refuses.
        """
        spec, parent = self.spec, os.getpid()
        self._pulse.reset()
        if spec.exit_file:
            spec.exit_file.unlink(missing_ok=True)
        if spec.starting_file:
            with contextlib.suppress(OSError):  # a full disk: it counts as ready, and so is never given up
                spec.starting_file.parent.mkdir(parents=True, exist_ok=True)
                spec.starting_file.touch()
        with contextlib.ExitStack() as stack:
            if spec.log:
                out = stack.enter_context(_open_log(spec.log))
                self._log_offset = os.fstat(out.fileno()).st_size
            self._process = subprocess.Popen(
                spec.argv,
                stdin=stdin,
                stdout=out if spec.log else stdout,
                stderr=subprocess.STDOUT if spec.log or stdout else None,
                env={
                    **os.environ,
                    **spec.env,
                    STARTING_FILE: str(spec.starting_file or ""),
                    BEAT_FILE: self._pulse.path if spec.beats else "",
                },
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent, spec.orphan_signal),
            )
        self._started = time.monotonic()
        return self._process

    def poll(self) -> Death | None:
        """Its death, once; None while it runs or before it was started."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        pid, self._process = self._process.pid, None
        # What the leader left behind must not meet its successor.
        end_group(pid, min(self.spec.grace_s, LEFTOVER_GRACE_S))
        return Death(self.spec.name, self._true_code(code), self.lived_s, self.ready)

    @property
    def ready(self) -> bool:
        """Has it come up since its start? One that has no way to say so counts as ready after a minute."""
        if self.spec.starting_file is None:
            return self.lived_s >= READY_AFTER_S
        return not self.spec.starting_file.exists()

    @property
    def lived_s(self) -> float:
        """Since its start."""
        return time.monotonic() - self._started

    def look(self, passed_s: float, stopped: Container[int]) -> Silence | None:
        """Does it work? None while it shows that it does. passed_s: since the last look; stopped: stopped groups."""
        if self._process is None:
            return None
        return self._pulse.look(passed_s, ready=self.ready, stopped=self._process.pid in stopped)

    def kill(self, dump: bool) -> None:
        """SIGKILL to the whole group, for `poll` to find; dump: first it writes its threads' stacks to its log."""
        if self._process is None:
            return
        pid = self._pulse.last.pid
        if dump and pid in group_members(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, DUMP_SIGNAL)
            self._await_dump()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _await_dump(self) -> None:
        """Until the log has grown and grows no more, for DUMP_S at most."""
        before = size = self._log_size()
        deadline = time.monotonic() + DUMP_S
        while time.monotonic() < deadline:
            time.sleep(0.3)
            last, size = size, self._log_size()
            if size == last > before:
                return

    def _log_size(self) -> int:
        return self.spec.log.stat().st_size if self.spec.log else 0

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End the whole group: SIGTERM, wait (not when `hurry` says so), SIGKILL. Returns when no member is left."""
        if self._process is None:
            return
        process, self._process = self._process, None
        end_group(process.pid, self.spec.grace_s, process, hurry)
        process.wait()

    def tail(self, lines: int = 12) -> list[str]:
        """The last lines that it logged since its start."""
        if self.spec.log is None or not self.spec.log.exists():
            return []
        with self.spec.log.open("rb") as log:
            log.seek(max(self._log_offset, log.seek(0, os.SEEK_END) - 16384))
            return log.read().decode(errors="replace").splitlines()[-lines:]

    def _true_code(self, code: int) -> int:
        if self.spec.exit_file and self.spec.exit_file.exists():
            with contextlib.suppress(ValueError):
                return int(self.spec.exit_file.read_text())
        return code


def _open_log(path: Path) -> IO[bytes]:
    """The log at its end, behind a line that tells of the start. A full disk costs the line, or even the log."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab", buffering=0)
    except OSError:
        return open(os.devnull, "ab", buffering=0)
    with contextlib.suppress(OSError):
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start\n".encode())
    return log


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
