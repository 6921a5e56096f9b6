"""What texts and numbers of a message or a config may be: one rule for both, so that every later reader can take them.

The wire's readers (envelope, schema), TaskSpec, the config's checks and what prints a stranger's words call in here.
Everything raises ValueError in one line: the key, what was expected, and what came, shortened and without control
characters.
"""

from typing import Any

import numpy as np

INT32, INT64 = 2**31 - 1, 2**63 - 1  # the largest of each; columns of the dataset are int64
NAME_BYTES = 128  # of a stage, task, camera, actor, process: part of a file's name, an episode's id, a line on a screen
ID_BYTES = 256  # of an episode: the stage's name, the seed and the ticket's digest
PROMPT_CHARACTERS = 4096
LAST_SECOND = 253_402_300_799  # of the year 9999: what a calendar can show, unix s
LARGEST = 1e18  # of a state or an action: its square still is a float32
LARGEST_REWARD = 1e9  # of a tick: an episode's return, squared, still is a float32
SHOWN = 80


def printable(text: str) -> str:
    """The text with everything that is no visible character, a newline or an escape sequence of a terminal, spelt out.

    >>> printable("a\\x1b[2J b")
    'a\\\\x1b[2J b'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any, limit: int = SHOWN) -> str:
    """What came, for a message: its repr, printable, at most `limit` characters of it."""
    if isinstance(value, str | bytes | list | tuple) and len(value) > limit:
        cut = printable(repr(value[:limit]))
        return f"{cut[:limit]}… ({len(value)} long)"
    text = printable(repr(value))
    return text if len(text) <= limit else f"{text[:limit]}…"


def check_name(key: str, value: Any, limit: int = NAME_BYTES) -> str:
    """A name: it becomes part of a path and of lines on a screen."""
    if not _is_text(value) or not 0 < len(value.encode()) <= limit or "/" in value or "\\" in value or value[0] == ".":
        raise ValueError(
            f"{key}: expected a name of 1 to {limit} bytes of printable characters, without / and \\ and not beginning "
            f"with a dot, got {shown(value)}"
        )
    return value


def check_text(key: str, value: Any, limit: int, least: int = 1) -> str:
    """A text for people or a model, on one line."""
    if not _is_text(value) or not least <= len(value) <= limit:
        raise ValueError(
            f"{key}: expected a text of {least} to {limit} characters on one line (no newline or other control "
            f"character), got {shown(value)}"
        )
    return value


def check_whole(key: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key}: expected a whole number from {low} to {high}, got {shown(value)}")
    return value


def check_number(key: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{key}: expected a number from {low:g} to {high:g}, got {shown(value)}")
    return value


def check_row_range(key: str, row: np.ndarray, low: float, high: float) -> None:
    """Every number of an array from `low` to `high`; names the first row that is not."""
    if row.size and not (low <= row.min() and row.max() <= high):  # NaN is not either
        outside = ~((row >= low) & (row <= high))
        at = int(outside.reshape(len(row), -1).any(axis=1).argmax())
        came = row[at] if row.ndim == 1 else row[at][outside[at]][0]
        raise ValueError(f"{key} at row {at}: expected {low} to {high}, got {came}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # a surrogate is not printable
