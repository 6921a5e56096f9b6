"""Keeps the learner's roles alive, shows how the run goes and ends it. Run by the learner's main; torch-free.

    start all ─▶ every 0.2 s: dead role? ─▶ exit 2: stop all, show why
                                        ├─▶ was ready: start it again, with backoff, however often
                                        └─▶ was never ready: the same, five times in a row: give up
                                            (a derived role never ends the run: it is started again for ever)
                 every second: stopped or silent role? ─▶ shown here and at the actors; too long: killed, so dead
                               status.json ─▶ dashboard; done, and no actor is waited for (ending.py)?
                                                ─▶ stop in order ─▶ summary.json, learning_curve.png
    SIGINT, SIGTERM ─▶ stop in order: trainer, policy, gateway, exporter (writes out what is journalled)

Nothing waits on the roles: the loop only reads a file and polls processes. A role is a process group that the kernel
ends when the supervisor dies. While the supervisor itself is stopped the roles go on, nothing is started again, and
the gateway tells the actors.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, TextIO

from serl_config.process import Death, RestartBudget, stopped_groups
from serl_launcher.run.internal import SupervisorLink
from serl_launcher.run.paths import RunPaths
from serl_launcher.supervisor.children import Child, ChildSpec
from serl_launcher.supervisor.disk import DiskWatch
from serl_launcher.supervisor.ending import LastEpisodes
from serl_launcher.supervisor.health import Health, StatusFile
from serl_launcher.supervisor.roles import STOP_ORDER
from serl_launcher.supervisor.screen import Screen
from serl_launcher.telemetry.dashboard import render
from serl_launcher.telemetry.journal_page import JournalPage

DONE, USER_MISTAKE, GAVE_UP = 0, 2, 3
TICK_S = 0.2
LOOK_S = 1.0
SHOWN_TAILS = 3  # deaths in a row after which a derived role's log is only named
FINISHED_WAIT_S = 3.0


class Supervisor:
    """Runs `roles` until the status says done, a signal comes or a role cannot be kept alive.

    Args:
        paths: the run folder; status.json is read there, logs and the summary are written there.
        roles: in start order; their names give the stop order.
        dashboard_period_s: seconds between two dashboards where `out` is not a terminal (1 s on one).
        console: where the console is, shown with the dashboard on a terminal; None: there is none.
        ends: whether a status with `done` ends the run; False for a schedule without stages: it serves until stopped.
        budget: one a role; when to start it again.
        page: the run's journal.md, which gets a section for each stage that is over.
        follows: this is a machine beyond the first: its part is over when its trainer is, as rank 0 decides.
    """

    def __init__(
        self,
        paths: RunPaths,
        roles: Sequence[ChildSpec],
        *,
        dashboard_period_s: float = 5.0,
        ends: bool = True,
        console: str | None = None,
        out: TextIO | None = None,
        budget: Callable[[], RestartBudget] = RestartBudget,
        page: JournalPage | None = None,
        follows: bool = False,
    ) -> None:
        out = out or sys.stdout
        self._paths = paths
        self._children = [Child(spec) for spec in roles]
        self._budgets = {spec.name: budget() for spec in roles}
        self._restart_at: dict[str, float] = {}
        self._finished: set[str] = set()  # roles that ended with exit code 0
        self._came_up: set[str] = set()  # roles that were ready once
        self._health = Health(lambda text: self._screen.event(text))
        self._status = StatusFile(paths.status)
        self._ends, self._page, self._console, self._follows = ends, page, console, follows
        self._screen = Screen(out)
        self._disk = DiskWatch(paths.root, self._screen.event)
        self._last_episodes = LastEpisodes(self._screen.event)
        self._period_s = 1.0 if out.isatty() else dashboard_period_s
        self._signal: int | None = None

    def run(self) -> int:
        """Exit code: 0 every stage is done, 2 a role reported a mistake of the user, 3 gave up, 128 + signal."""
        try:
            link = SupervisorLink(self._paths.root)
        except OSError as error:  # a folder of somebody else's where the roles' socket belongs
            self._screen.event(f"the roles cannot meet: {error}")
            return USER_MISTAKE
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            for child in self._children:
                child.start()
            pids = ", ".join(f"{child.spec.name} {child.pid}" for child in self._children)
            self._screen.event(f"learner of run {self._paths.root.name}: {pids}; logs in {self._paths.logs}")
            with closing(link):
                code = self._loop(link)
        finally:
            self._stop_all()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if code == DONE and not self._follows:
            return self._sum_up("is complete")
        if not self._ends and not self._follows and self._status.body.get("eval"):
            self._sum_up("was stopped; its evaluations so far")
        return code

    def _loop(self, link: SupervisorLink) -> int:
        last_look, next_dashboard = time.monotonic() - LOOK_S, 0.0
        while self._signal is None:
            for child in self._children:
                code = self._look_after(child)
                if code is not None:
                    return code
            now = time.monotonic()
            if now - last_look >= LOOK_S:
                self._disk.look()
                troubles = self._look(now - last_look)
                link.tell(troubles)
                last_look = now
                if self._page is not None:
                    self._page.look(self._status.body)
                if self._ends and not self._follows and self._last_episodes.are_over(self._status.body):
                    return DONE
                if now >= next_dashboard and (lines := self._lines(troubles)):
                    next_dashboard = now + self._period_s
                    self._screen.dashboard(lines)
            time.sleep(TICK_S)
        alone = self._last_episodes.waits_for(self._status.body)
        what = f"not waiting for {alone}, stopping the roles" if alone else "stopping the roles"
        self._screen.event(f"{signal.Signals(self._signal).name}: {what} (once more: at once)")
        return 128 + self._signal

    def _look(self, passed_s: float) -> dict[str, str]:
        """Once a second: what ails the roles, by name; whoever hangs for good is killed."""
        self._status.look(passed_s)
        stopped = stopped_groups()
        for child in self._children:
            self._health.look(child, passed_s, stopped)
        return self._health.troubles(self._restart_at)

    def _lines(self, troubles: Mapping[str, str]) -> list[str]:
        """The dashboard; old figures are not shown as if they were news."""
        told = self._status.body.get("troubles") or {}  # of the gateway and the trainer; ours come back a second late
        others = {name: text for name, text in told.items() if name not in self._budgets and name != "supervisor"}
        silent_s = self._status.silent_s
        lines = render(self._status.body, silent_s, {**others, **troubles}, whole=self._screen.is_terminal)
        shown = lines and self._console and self._screen.is_terminal
        return [*lines, f"  console    {self._console}"] if shown else lines

    def _look_after(self, child: Child) -> int | None:
        """Notice a death, start again when due; an exit code when the run cannot go on."""
        name = child.spec.name
        if death := child.poll():
            return self._after_death(child, death)
        rests = name in self._finished and self._status.body.get("done")  # the last episodes do without it
        if name in self._restart_at and time.monotonic() >= self._restart_at[name] and not rests:
            self._start_again(child)
        return None

    def _start_again(self, child: Child) -> None:
        name = child.spec.name
        try:
            child.start()
        except OSError as error:  # no process, no file: whatever it is may pass
            wait_s = self._budgets[name].wait_s(0.0)
            self._restart_at[name] = time.monotonic() + wait_s
            self._screen.event(f"{name} cannot be started ({error}); trying again in {wait_s:g} s")
            return
        del self._restart_at[name]
        self._finished.discard(name)
        self._screen.event(f"{name} started again (pid {child.pid})")

    def _after_death(self, child: Child, death: Death) -> int | None:
        """Plan the next start; an exit code when there is none."""
        lines = "".join(f"\n    {line}" for line in child.tail())
        may_end = self._may_end_run(child, death)
        if death.code == USER_MISTAKE and may_end:
            self._screen.event(f"{death.name} cannot run:{lines}")
            return USER_MISTAKE
        budget = self._budgets[death.name]
        wait_s = budget.died(death) if may_end else budget.wait_s(death.lived_s)
        if wait_s is None:
            self._screen.event(
                f"{death.name} keeps dying before it is ready ({death.cause}); giving up. "
                f"Its last lines, from {child.spec.log}:{lines}"
            )
            return GAVE_UP
        if death.code == 0 and self._follows:
            self._screen.event(f"{death.name} ended as rank 0 decided: this machine's part of the run is over")
            return DONE
        if death.code == 0:  # most likely it has seen the end of the schedule a moment before us
            self._finished.add(death.name)
            self._restart_at[death.name] = time.monotonic() + max(wait_s, FINISHED_WAIT_S)
            return None
        self._restart_at[death.name] = time.monotonic() + wait_s
        self._health.ended(death)
        when = "" if death.ready else " before it was ready"
        often = f", for the {budget.in_a_row}th time in quick succession" if budget.in_a_row > 3 else ""
        tail = "" if death.code == -signal.SIGKILL else f"; its last lines:{lines}"
        if budget.in_a_row > SHOWN_TAILS and not may_end:
            tail = f"; see {child.spec.log}"
        self._screen.event(f"{death.name} ended{when} ({death.cause}){often}; starting it again in {wait_s:g} s{tail}")
        return None

    def _may_end_run(self, child: Child, death: Death) -> bool:
        """Derived roles may be missing for a while: what they make can be made later."""
        if death.ready:
            self._came_up.add(death.name)
        ends = child.spec.ends_run
        return ends == "always" or (ends == "until ready" and death.name not in self._came_up)

    def _stop_all(self) -> None:
        """In STOP_ORDER; a second signal shortens every grace."""
        first = self._signal
        self._signal = None
        order = {name: k for k, name in enumerate(STOP_ORDER)}
        for child in sorted(self._children, key=lambda c: order.get(c.spec.name, len(order))):
            if child.pid is not None:
                child.stop(hurry=lambda: self._signal is not None)
        self._signal = self._signal or first

    def _sum_up(self, how: str) -> int:
        """The figures of a run; the exit code."""
        from serl_launcher.telemetry.summary import write_summary

        try:
            rows = write_summary(self._paths.root)
        except OSError as error:
            self._screen.event(
                f"run {self._paths.root.name} {how}, but {self._paths.summary} cannot be written: {error}. Start again"
            )
            return GAVE_UP
        width = max(map(len, rows))
        table = "\n".join(f"  {key:<{width}}  {_short(value)}" for key, value in rows.items())
        self._screen.plain(f"run {self._paths.root.name} {how}\n{table}")
        self._screen.plain(f"  {self._paths.summary}\n  {self._paths.learning_curve}")
        return DONE

    def _on_signal(self, signum: int, _frame: object) -> None:
        self._signal = signum


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
