"""Keeps the learner's roles alive, shows how the run goes and ends it. Run by the learner's main; torch-free.

    start all ─▶ every 0.2 s: dead role? ─▶ exit 2: stop all, show why
                                        ├─▶ was ready: start it again, with backoff, however often
                                        └─▶ was never ready: the same, five times in a row: give up
                 every second: status.json ─▶ dashboard; done? ─▶ stop in order ─▶ summary.json, learning_curve.png
    SIGINT, SIGTERM ─▶ stop in order: trainer, policy, gateway, exporter (writes out what is journalled)

Nothing waits on the roles: the loop only reads a file and polls processes. A role is a process group that the kernel
ends when the supervisor dies.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from serl_launcher.run.files import read_json
from serl_launcher.run.paths import RunPaths
from serl_launcher.supervisor.children import Child, ChildSpec, Death, RestartBudget
from serl_launcher.supervisor.disk import DiskWatch
from serl_launcher.supervisor.roles import STOP_ORDER
from serl_launcher.supervisor.screen import Screen
from serl_launcher.telemetry.dashboard import render_line, render_status

DONE, USER_MISTAKE, GAVE_UP = 0, 2, 3
TICK_S = 0.2
FINISHED_WAIT_S = 3.0


class Supervisor:
    """Runs `roles` until the status says done, a signal comes or a role cannot be kept alive.

    Args:
        paths: the run folder; status.json is read there, logs and the summary are written there.
        roles: in start order; their names give the stop order.
        dashboard_period_s: seconds between two dashboards where `out` is not a terminal (1 s on one).
        ends: whether a status with `done` ends the run; False for a schedule without stages: it serves until stopped.
        budget: one a role; when to start it again.
    """

    def __init__(
        self,
        paths: RunPaths,
        roles: Sequence[ChildSpec],
        *,
        dashboard_period_s: float = 5.0,
        ends: bool = True,
        out: TextIO | None = None,
        budget: Callable[[], RestartBudget] = RestartBudget,
    ) -> None:
        out = out or sys.stdout
        self._paths = paths
        self._children = [Child(spec) for spec in roles]
        self._budgets = {spec.name: budget() for spec in roles}
        self._restart_at: dict[str, float] = {}
        self._ends = ends
        self._screen = Screen(out)
        self._disk = DiskWatch(paths.root, self._screen.event)
        self._period_s = 1.0 if out.isatty() else dashboard_period_s
        self._signal: int | None = None

    def run(self) -> int:
        """Exit code: 0 every stage is done, 2 a role reported a mistake of the user, 3 gave up, 128 + signal."""
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            for child in self._children:
                child.start()
            pids = ", ".join(f"{child.spec.name} {child.pid}" for child in self._children)
            self._screen.event(f"learner of run {self._paths.root.name}: {pids}; logs in {self._paths.logs}")
            code = self._loop()
        finally:
            self._stop_all()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return self._sum_up() if code == DONE else code

    def _loop(self) -> int:
        next_status = next_dashboard = 0.0
        while self._signal is None:
            for child in self._children:
                code = self._look_after(child)
                if code is not None:
                    return code
            now = time.monotonic()
            if now >= next_status:
                next_status = now + 1.0
                self._disk.look()
                status = read_json(self._paths.status)
                if status and now >= next_dashboard:
                    next_dashboard = now + self._period_s
                    lines = render_status(status) if self._screen.is_terminal else [render_line(status)]
                    self._screen.dashboard(lines)
                if status and status.get("done") and self._ends:
                    self._screen.event("every stage is done")
                    return DONE
            time.sleep(TICK_S)
        self._screen.event(f"{signal.Signals(self._signal).name}: stopping the roles (once more: at once)")
        return 128 + self._signal

    def _look_after(self, child: Child) -> int | None:
        """Notice a death, start again when due; an exit code when the run cannot go on."""
        name = child.spec.name
        if death := child.poll():
            return self._after_death(child, death)
        if name in self._restart_at and time.monotonic() >= self._restart_at[name]:
            del self._restart_at[name]
            child.start()
            self._screen.event(f"{name} started again (pid {child.pid})")
        return None

    def _after_death(self, child: Child, death: Death) -> int | None:
        """Plan the next start; an exit code when there is none."""
        lines = "".join(f"\n    {line}" for line in child.tail())
        if death.code == USER_MISTAKE:
            self._screen.event(f"{death.name} cannot run:{lines}")
            return USER_MISTAKE
        budget = self._budgets[death.name]
        wait_s = budget.died(death)
        if wait_s is None:
            self._screen.event(
                f"{death.name} keeps dying before it is ready ({death.cause}); giving up. "
                f"Its last lines, from {child.spec.log}:{lines}"
            )
            return GAVE_UP
        if death.code == 0:  # most likely it has seen the end of the schedule a moment before us
            self._restart_at[death.name] = time.monotonic() + max(wait_s, FINISHED_WAIT_S)
            return None
        self._restart_at[death.name] = time.monotonic() + wait_s
        when = "" if death.ready else " before it was ready"
        often = f", for the {budget.in_a_row}th time in quick succession" if budget.in_a_row > 3 else ""
        tail = "" if death.code == -signal.SIGKILL else f"; its last lines:{lines}"
        self._screen.event(f"{death.name} ended{when} ({death.cause}){often}; starting it again in {wait_s:g} s{tail}")
        return None

    def _stop_all(self) -> None:
        """In STOP_ORDER; a second signal shortens every grace."""
        first = self._signal
        self._signal = None
        order = {name: k for k, name in enumerate(STOP_ORDER)}
        for child in sorted(self._children, key=lambda c: order.get(c.spec.name, len(order))):
            if child.pid is not None:
                child.stop(hurry=lambda: self._signal is not None)
        self._signal = self._signal or first

    def _sum_up(self) -> int:
        """The figures of a finished run; the exit code."""
        from serl_launcher.telemetry.summary import write_summary

        try:
            rows = write_summary(self._paths.root)
        except OSError as error:
            self._screen.event(
                f"every stage is done, but {self._paths.summary} cannot be written: {error}. Start again"
            )
            return GAVE_UP
        width = max(map(len, rows))
        table = "\n".join(f"  {key:<{width}}  {_short(value)}" for key, value in rows.items())
        self._screen.plain(f"run {self._paths.root.name} is complete\n{table}")
        self._screen.plain(f"  {self._paths.summary}\n  {self._paths.learning_curve}")
        return DONE

    def _on_signal(self, signum: int, _frame: object) -> None:
        self._signal = signum


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
