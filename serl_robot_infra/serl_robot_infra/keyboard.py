"""Keys of the terminal at which the actor runs: e-stop, operator, verdict. Started by `wiring`.

    terminal ─▶ key thread ─▶ fn() of whoever asked for that key, in that thread, within a millisecond

One thread reads for everybody, because a key that one reader takes is gone for the others.
"""

import atexit
import logging
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable

log = logging.getLogger(__name__)

POLL_S = 0.1
NAMES = {"space": " ", "enter": "\n", "esc": "\x1b", "tab": "\t", "backspace": "\x7f"}
ReadKey = Callable[[], str | None]


class TerminalGoneError(Exception):
    """The terminal was closed."""


class Keyboard:
    """read_key: waits at most POLL_S for a character; None: there was none; raises TerminalGoneError."""

    def __init__(self, read_key: ReadKey) -> None:
        self._read_key = read_key
        self._wanted: dict[str, tuple[str, Callable[[], None]]] = {}  # character -> (who asked, what to call)
        self.closed = False  # the terminal is gone
        self._thread = threading.Thread(target=self._listen, name="keys", daemon=True)

    def on(self, key: str, fn: Callable[[], None], owner: str) -> None:
        """Call `fn` whenever `key` is pressed; `owner` is the config key that names it.

        Raises ValueError when `key` is no key, or is another owner's.
        """
        character = character_of(key, owner)
        if character in self._wanted and self._wanted[character][0] != owner:
            raise ValueError(f"{owner}: the key {key!r} is {self._wanted[character][0]} already; name another one")
        self._wanted = {**self._wanted, character: (owner, fn)}
        if self._thread.ident is None:
            self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                key = self._read_key()
            except TerminalGoneError:
                self.closed = True
                log.warning("the terminal was closed: keys do nothing any more")
                return
            if key in self._wanted:
                self._wanted[key][1]()


def character_of(key: str, owner: str) -> str:
    """`space` and the like, or a single character, as the terminal sends it. ValueError naming `owner` otherwise."""
    character = NAMES.get(str(key), str(key))
    if len(character) != 1:
        raise ValueError(f"{owner}: expected one character or {', '.join(NAMES)}, got {key!r}")
    return character


_terminal: list[tuple[int, Keyboard]] = []  # of this process's standard input, made once


def terminal_keyboard() -> Keyboard | None:
    """The keyboard of this process's terminal; None where standard input is no terminal or is another job's."""
    try:
        file = sys.stdin.fileno()
        device = os.fstat(file).st_rdev
    except (AttributeError, OSError, ValueError):  # no standard input, or one without a descriptor
        return None
    if not os.isatty(file) or not _is_ours(file):
        return None
    if not _terminal or _terminal[0][0] != device:
        _terminal[:] = [(device, Keyboard(terminal_reader(file)))]
    return _terminal[0][1]


def terminal_reader(file: int) -> ReadKey:
    """Characters of the terminal `file` without waiting for return; its mode is restored when the process ends.

    Reads a descriptor of its own: whoever closes `file` cannot leave it reading what gets that number next.
    """
    file = os.dup(file)
    before = termios.tcgetattr(file)
    atexit.register(_restore, file, before)
    tty.setcbreak(file)

    def read() -> str | None:
        if not _is_ours(file):  # a background job that reads is stopped by the kernel
            time.sleep(POLL_S)
            return None
        try:
            ready, _, _ = select.select([file], [], [], POLL_S)
            character = os.read(file, 1) if ready else None
        except OSError:
            raise TerminalGoneError from None
        if character == b"":
            raise TerminalGoneError
        return character.decode(errors="replace").replace("\r", "\n") if character else None  # return sends either

    return read


def _restore(file: int, mode: list) -> None:
    try:
        termios.tcsetattr(file, termios.TCSADRAIN, mode)
    except termios.error:
        log.debug("the terminal is gone: its mode needs no restoring")


def _is_ours(file: int) -> bool:
    """Are we in the terminal's foreground? A terminal that is not our session's has no such notion."""
    try:
        return os.tcgetpgrp(file) == os.getpgrp()
    except OSError:
        return True
