"""One role as a child process: its log, how it says that it is up, and how it shows that it works.

    Child.start ─▶ own session, dies with us ─▶ poll ─▶ Death (serl_config.process)
         ├ starting file ─▶ removed by the child once it is up (run.ready)
         └ beats ◀─ its work loop (run.alive) ─▶ look ─▶ Silence ─▶ kill

Used by the supervisor, which starts them again by a `RestartBudget`.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from serl_config.process import Process, ProcessSpec, group_members
from serl_launcher.run.alive import BEAT_FILE, DUMP_SIGNAL
from serl_launcher.run.ready import STARTING_FILE
from serl_launcher.supervisor.pulse import Pulse, Silence

EndsRun = Literal["always", "until ready", "never"]
DUMP_S = 3.0  # for a role that hangs to write down where


@dataclass(frozen=True, slots=True)
class ChildSpec(ProcessSpec):
    """What to run and how it ends."""

    log: Path | None = None  # stdout and stderr are appended here; None: they are ours
    starting_file: Path | None = None  # exists from the start until the child says that it is ready (run.ready)
    beats: bool = False  # its work loop shows that it goes on (run.alive)
    ends_run: EndsRun = "always"  # may a mistake or repeated deaths of it end the run?


class Child(Process):
    """One role; may be started again after its death."""

    spec: ChildSpec

    def __init__(self, spec: ChildSpec) -> None:
        super().__init__(spec)
        self._pulse = Pulse()
        self._log_offset = 0

    def start(self, stdout: int | IO | None = None, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen:
        """Spawn it; its log takes the place of `stdout`. OSError: the system refuses."""
        spec = self.spec
        self._pulse.reset()
        if spec.starting_file:
            with contextlib.suppress(OSError):  # a full disk: it counts as ready, and so is never given up
                spec.starting_file.parent.mkdir(parents=True, exist_ok=True)
                spec.starting_file.touch()
        if spec.log is None:
            return super().start(stdout, stdin)
        with _open_log(spec.log) as out:
            self._log_offset = os.fstat(out.fileno()).st_size
            return super().start(out, stdin)

    def _more_env(self) -> Mapping[str, str]:
        starting = str(self.spec.starting_file or "")
        return {STARTING_FILE: starting, BEAT_FILE: self._pulse.path if self.spec.beats else ""}

    @property
    def ready(self) -> bool:
        """Has it come up since its start? One that has no way to say so counts as ready after a minute."""
        return super().ready if self.spec.starting_file is None else not self.spec.starting_file.exists()

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

    def tail(self, lines: int = 12) -> list[str]:
        """The last lines that it logged since its start."""
        if self.spec.log is None or not self.spec.log.exists():
            return []
        with self.spec.log.open("rb") as log:
            log.seek(max(self._log_offset, log.seek(0, os.SEEK_END) - 16384))
            return log.read().decode(errors="replace").splitlines()[-lines:]


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
