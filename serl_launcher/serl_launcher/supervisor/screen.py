"""The learner's pane: events scroll by, the dashboard stays below them on a terminal and is one line elsewhere.

Written by the supervisor. start.sh without tmux prefixes each line, so the cursor is moved on a terminal only.
"""

import os
import time
from collections.abc import Sequence
from typing import TextIO

from serl_launcher.run.files import disk_trouble


class Screen:
    """Prints to `out`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.is_terminal = out.isatty()
        self._drawn = 0  # dashboard lines now on the terminal

    def event(self, text: str) -> None:
        """One thing that happened; stays on the screen."""
        self.plain(f"{time.strftime('%H:%M:%S')} {text}")

    def plain(self, text: str) -> None:
        """Text without a time, such as the final table."""
        self._erase()
        self._print(text)

    def dashboard(self, lines: Sequence[str]) -> None:
        """Replace the last dashboard (terminal), or print it below."""
        if not self.is_terminal:
            self._print("\n".join(lines))
            return
        self._erase()
        columns, rows = os.get_terminal_size(self._out.fileno())
        # A wrapped or scrolled line could not be erased.
        shown = [line[: max(1, columns - 1)] for line in lines[: max(1, rows - 1)]]
        self._print("\n".join(shown))
        self._drawn = len(shown)

    def _print(self, text: str) -> None:
        """A line that a full disk refuses, where the screen is a file, is lost; the run is not."""
        try:
            print(text, file=self._out, flush=True)
        except OSError as error:
            if disk_trouble(error) is None:
                raise

    def _erase(self) -> None:
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0
