"""Two tmux panes, actor left and learner right, on a tmux server of our own. Used by start.py.

A server of its own (`tmux -L <socket>`) keeps the user's sessions out of reach: killing ours cannot end theirs.
"""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

SESSION = "flowserl"


class Panes:
    """One session with one window of two panes."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._ids: dict[str, str] = {}

    def open(self, commands: dict[str, Sequence[str]], folder: Path) -> None:
        """Start the session; `commands` maps a pane's name to its command, left to right; the first has the keys."""
        for name, command in commands.items():
            words = ["new-session", "-d", "-s", SESSION, "-x", "200", "-y", "50"] if not self._ids else []
            words = words or ["split-window", "-h", "-t", f"{SESSION}:"]
            line = shlex.join(command)
            self._ids[name] = self._run(*words, "-c", str(folder), "-P", "-F", "#{pane_id}", line).strip()
            # A pane that ended keeps its text: the reason is read from there.
            self._run("set-option", "-w", "-t", f"{SESSION}:", "remain-on-exit", "on")
        self._run("select-layout", "-t", f"{SESSION}:", "even-horizontal")
        self._run("select-pane", "-t", next(iter(self._ids.values())))  # what is typed goes to the leftmost

    def attach(self) -> subprocess.Popen:
        """Show the session on our terminal, in a child."""
        environment = {k: v for k, v in os.environ.items() if k != "TMUX"}  # a session inside the user's own is fine
        return subprocess.Popen(self._command("attach-session", "-t", SESSION), env=environment)

    def text(self, name: str, lines: int = 30) -> str:
        """The last lines that a pane shows."""
        shown = self._run("capture-pane", "-p", "-J", "-S", "-200", "-t", self._ids[name]).rstrip().splitlines()
        if shown and shown[-1].startswith("Pane is dead"):  # tmux's own note, at the bottom of an empty screen
            shown.pop()
        while shown and not shown[-1].strip():
            shown.pop()
        return "\n".join(shown[-lines:])

    def close(self) -> None:
        """End the server; its panes' processes get SIGHUP."""
        subprocess.run(self._command("kill-server"), capture_output=True, check=False)
        folder = Path(os.environ.get("TMUX_TMPDIR", "/tmp")) / f"tmux-{os.getuid()}"
        (folder / self.socket).unlink(missing_ok=True)  # tmux leaves the dead socket behind

    def exists(self) -> bool:
        """Does the session still run?"""
        return subprocess.run(self._command("has-session", "-t", SESSION), capture_output=True).returncode == 0

    def _run(self, *words: str) -> str:
        done = subprocess.run(self._command(*words), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"tmux {words[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def _command(self, *words: str) -> list[str]:
        return ["tmux", "-L", self.socket, *words]
