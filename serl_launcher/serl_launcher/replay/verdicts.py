"""The acceptance ledger: for every finished episode, whether it is imitated, why, by which rule and policy version.

The chunk view (replay.views) reports verdicts; the trainer keeps them in runs/<name>/acceptance.jsonl. Derived: it can
be made again from the journal, with the run's rule or with another one (tools/reaccept.py).
"""

import contextlib
import json
import logging
import os
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from serl_launcher.run.files import DamagedFileError, append_whole, clear, seal, unseal, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule's decision on one episode, and what it was made from."""

    ordinal: int  # of the journal
    mode: str  # demo or online
    ticks: int  # n
    return_: float  # Σ r, or discounted as the rule asks
    success: bool
    operator_ticks: int
    policy_versions: tuple[int, int]  # oldest and newest that acted (−1: none)
    accepted: bool
    reason: str  # one word
    starts: int  # ticks at which a chunk may begin
    labels: int  # ticks whose action is a label
    threshold: float | None  # m when the episode came, where a schedule sets it
    act: int = 0  # number of the last act in which a person said something of it; 0: none did


KEYS = frozenset({*Verdict.__dataclass_fields__, "return", "rule"} - {"return_"})  # of a line
NEEDED = frozenset({"ordinal", "mode", "return", "accepted", "reason", "rule"})  # older releases wrote fewer


def rule_text(rule: Any, threshold: Any = None) -> str:
    """A rule, its settings and its threshold's, for people and for telling rules apart."""
    own = _settings(rule)
    return own if threshold is None else f"{own}, m by {_settings(threshold)}"


def _settings(thing: Any) -> str:
    if not is_dataclass(thing):
        return str(thing) if type(thing).__str__ is not object.__str__ else type(thing).__name__
    settings = ", ".join(f"{key}={value!r}" for key, value in asdict(thing).items())
    return f"{type(thing).__name__}({settings})"


class VerdictLedger:
    """Appends verdicts that are new: a view that is rebuilt after a restart repeats the earlier ones.

    It outlives the ring: `returns` are those of every episode that was ever judged, in ordinal order.
    """

    def __init__(self, path: Path, rule: str) -> None:
        self._path, self._rule = path, rule
        clear(path)
        rows, self.incomplete = _rows(path)  # lines were lost, by a kill in mid-line or by damage: judge_journal
        # What is to stand in its place, before the next line; None: the file is in order.
        self._rewritten = "".join(_line(row) for row in rows) if self.incomplete else None
        # ordinal -> verdicts of this rule since another rule's: accepted, reason, act
        self._written: dict[int, set[tuple[bool, str, int]]] = {}
        for row in rows:
            written = self._written.setdefault(row["ordinal"], set())
            if row["rule"] == rule:
                written.add((row["accepted"], row["reason"], row.get("act", 0)))
            else:
                written.clear()
        self._newest = newest(rows)
        self._lines: list[str] = []  # not in the file yet
        self._returns = {row["ordinal"]: (row["mode"], row["return"]) for row in rows}
        self._fresh = dict(self._returns)
        with contextlib.suppress(OSError):
            self.write()

    def returns(self, after: int, before: int) -> list[tuple[str, float]]:
        """Mode and return of the episodes whose ordinals lie between these, oldest first."""
        return [self._returns[ordinal] for ordinal in range(after + 1, before) if ordinal in self._returns]

    def fresh(self) -> list[list[Any]]:
        """Ordinal, mode and return of the episodes that were judged since the last call; at first, of all."""
        fresh, self._fresh = self._fresh, {}
        return [[ordinal, *row] for ordinal, row in fresh.items()]

    @property
    def accepted(self) -> int:
        """Episodes, demonstrations included, whose newest verdict is that they are imitated."""
        return sum(self._newest.values())

    def note(self, verdict: Verdict) -> None:
        """Append one line, unless this rule's verdict on the episode is written already.

        What the disk refuses is kept for `write`: the view that tells a verdict is in the middle of its own work.
        """
        self._returns[verdict.ordinal] = self._fresh[verdict.ordinal] = (verdict.mode, verdict.return_)
        key, written = (verdict.accepted, verdict.reason, verdict.act), self._written.setdefault(verdict.ordinal, set())
        if key in written:
            return
        written.add(key)
        self._newest[verdict.ordinal] = verdict.accepted
        row = asdict(verdict)
        row["return"] = row.pop("return_")
        self._lines.append(_line(row | {"rule": self._rule}))
        with contextlib.suppress(OSError):
            self.write()

    def write(self) -> None:
        """Put into the file what is not in it yet; the trainer calls it after each refresh. OSError: nothing was."""
        if self._rewritten is not None:
            write_text(self._path, self._rewritten)
            self._rewritten = None
        if not self._lines:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            append_whole(descriptor, "".join(self._lines).encode())
        finally:
            os.close(descriptor)
        self._lines.clear()


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a ledger; [] when there is none. Damaged lines are left out, and named in the log."""
    return _rows(path)[0]


def _rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Whole lines, and whether anything else was there, or nothing at all where a file was."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], any(path.parent.glob(f"{path.name}.damaged-*"))
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror}. Move it away: it is made again") from None
    rows, damaged = [], []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(_row(line))
        except (ValueError, AttributeError):
            damaged.append(number)
    if damaged:
        log.warning(
            "%s is damaged: %d of %d lines cannot be used, the first is line %d",
            path, len(damaged), len(lines) - 1, damaged[0],
        )  # fmt: skip
    return rows, not rows or bool(damaged) or bool(lines[-1])  # what follows the last newline was torn by a kill


def _line(row: dict[str, Any]) -> str:
    return json.dumps(seal(row)) + "\n"


def _row(line: bytes) -> dict[str, Any]:
    return unseal(json.loads(line), KEYS, NEEDED)


def newest(rows: list[dict[str, Any]]) -> dict[int, bool]:
    """Ordinal -> accepted, by the last line on each episode."""
    return {row["ordinal"]: row["accepted"] for row in rows}
