"""How the roles are, as the supervisor shows it to both sides; and how old the gateway's news is.

Child.look ─▶ Health.look ─▶ killed when nothing is to be hoped for        Health.troubles ─▶ dashboard, gateway, actors
status.json ─▶ StatusFile ─▶ body, silent_s ─▶ dashboard
"""

import signal
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from serl_config.process import Death
from serl_launcher.run.files import read_json
from serl_launcher.supervisor.children import Child
from serl_launcher.supervisor.pulse import LONGEST_LOOK_S, Silence

SHOWN_S = 5.0  # a restart stays on the screens for so long at least: an actor hears of it once a second


class Health:
    """event: shows one thing that happened."""

    def __init__(self, event: Callable[[str], None]) -> None:
        self._event = event
        self._silent: dict[str, str] = {}  # role -> what it does not do
        self._ended: dict[str, str] = {}  # role -> how it ended last, until it is well again
        self._killed: set[str] = set()  # roles whose end is waited for

    def look(self, child: Child, passed_s: float, stopped: Container[int]) -> None:
        """Once a second. passed_s: since the last look; stopped: process groups with a stopped member."""
        name = child.spec.name
        silence = child.look(passed_s, stopped)
        if silence is None:
            self._silent.pop(name, None)
        else:
            self._notice(child, silence)
        if child.pid is not None and child.ready and child.lived_s > SHOWN_S:
            self._ended.pop(name, None)

    def _notice(self, child: Child, silence: Silence) -> None:
        name = child.spec.name
        if name in self._killed:
            self._silent[name] = f"{silence.text}; killed, and the system has not ended it yet"
            return
        if name not in self._silent:
            self._event(f"{name}: {silence.text}")
        self._silent[name] = silence.text
        if silence.over:
            self._killed.add(name)
            where = "" if silence.stopped else f"; where it hung: {child.spec.log}"
            self._event(f"{name} is killed ({silence.text}){where}")
            child.kill(dump=not silence.stopped)

    def ended(self, death: Death) -> None:
        """A role is gone and will be started again."""
        killed = death.name in self._killed and death.code in (-signal.SIGKILL, -signal.SIGUSR2)
        self._ended[death.name] = f"killed, {self._silent.get(death.name, 'silent')}" if killed else death.cause
        self._killed.discard(death.name)
        self._silent.pop(death.name, None)

    def troubles(self, restart_at: Mapping[str, float]) -> dict[str, str]:
        """What ails the roles, by name; empty when all is well. restart_at: role -> monotonic time of its start."""
        now = time.monotonic()
        found = {name: f"is coming up again after it ended ({how})" for name, how in self._ended.items()}
        for name, at in restart_at.items():
            if name in self._ended:
                found[name] = f"ended ({self._ended[name]}), starts again in {max(0.0, at - now):.0f} s"
        return found | self._silent


class StatusFile:
    """The status document on disk, and for how long it has said nothing new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.body: dict[str, Any] = {}  # empty before the first
        self.silent_s = 0.0

    def look(self, passed_s: float) -> None:
        """Once a second; passed_s: since the last look. A gateway writes another document every second."""
        body = read_json(self._path) or self.body
        self.silent_s = 0.0 if body != self.body else self.silent_s + min(passed_s, LONGEST_LOOK_S)
        self.body = body
