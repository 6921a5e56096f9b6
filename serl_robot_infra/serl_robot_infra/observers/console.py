"""The actor's pane: one line per episode, a live line on a terminal, and messages. Fed by the actor loop."""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.contract.bounds import printable
from serl_transport.contract.schema import DISCARD, EpisodeInfo, Observation, TimeStep

_LIVE_PERIOD_S = 1.0
_REPEAT_PERIOD_S = 15.0
_CLEAR_LINE = "\r\x1b[K"


@dataclass(frozen=True, slots=True)
class Vitals:
    """How the rollout is doing right now."""

    infer_p50_ms: float | None  # median inference latency; None before the first
    backlog: int  # step batches not yet acknowledged by the learner
    overruns: int  # ticks that came later than the control rate asks
    refused: int  # step batches that the learner will never take; they are set aside in the spool


class ConsoleObserver(Observer):
    """Prints to `stream`; a terminal also gets a line that is rewritten in place. vitals: asked at each line."""

    def __init__(self, vitals: Callable[[], Vitals], stream: TextIO | None = None):
        self._vitals = vitals
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._info: EpisodeInfo | None = None
        self._ticks = 0
        self._started = 0.0
        self._next_live = 0.0
        self._by_hand = False
        self._told_at: dict[str, float] = {}

    def episode_started(self, info: EpisodeInfo) -> None:
        self._info, self._ticks, self._started = info, 0, time.monotonic()

    def tick(self, step: TimeStep) -> None:
        """Rewrite the live line, once a second and when another one drives."""
        self._ticks += 1
        now = time.monotonic()
        if step.intervention != self._by_hand:  # whoever took over or let go sees it at once
            self._by_hand, self._next_live = step.intervention, now
        if not self._is_terminal or now < self._next_live or self._info is None:
            return
        self._next_live = now + _LIVE_PERIOD_S
        who = "operator" if step.intervention else _policy(step.policy_version)
        rate = self._ticks / max(now - self._started, 1e-3)
        self._live(f"{self._info.stage} · tick {self._ticks} · {who} drives · {rate:.0f} Hz · {self._tail()}")

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        """One line; an episode that was never sent gives a message only."""
        if report.cut_reason:
            self.message(report.cut_reason)
        if report.ticks:
            self._print(episode_line(report) + " · " + self._tail())

    def message(self, text: str) -> None:
        """Print once, and again each 15 s while only its numbers change; on a terminal the live line shows it anew."""
        text = printable(text)  # it may quote a server
        kind, now = _kind(text), time.monotonic()
        if now - self._told_at.get(kind, -_REPEAT_PERIOD_S) >= _REPEAT_PERIOD_S:
            self._told_at[kind] = now
            self._print(text)
        elif self._is_terminal:
            self._live(text)

    def trouble(self, text: str | None) -> None:
        """As a message."""
        if text is not None:
            self.message(text)

    def ask(self, text: str) -> None:
        """Print it, each time."""
        self._told_at[_kind(text)] = time.monotonic()
        self._print(text)

    def close(self) -> None:
        """Leave the live line."""
        if self._is_terminal:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def _tail(self) -> str:
        vitals = self._vitals()
        latency = "" if vitals.infer_p50_ms is None else f"infer {vitals.infer_p50_ms:.0f} ms · "
        overruns = f" · {vitals.overruns} overruns" if vitals.overruns else ""
        refused = f" · {vitals.refused} REFUSED, see the spool" if vitals.refused else ""
        return f"{latency}backlog {vitals.backlog}{overruns}{refused}"

    def _live(self, text: str) -> None:
        self._stream.write(_CLEAR_LINE + text)
        self._stream.flush()

    def _print(self, text: str) -> None:
        self._stream.write((_CLEAR_LINE if self._is_terminal else "") + text + "\n")
        self._stream.flush()


def episode_line(report: EpisodeReport) -> str:
    """`#12 online · success · return 1.0 · 31 ticks: policy v7 22, operator 9 · 41 Hz`."""
    if report.outcome.success:
        result = "success"
    else:
        result = {None: "failure", "time_limit": "failure (time limit)", DISCARD: "discarded"}.get(
            report.outcome.truncated_by, f"cut ({report.outcome.truncated_by})"
        )
    policy_ticks = report.ticks - report.operator_ticks
    drivers = [f"{_policy(report.policy_version)} {policy_ticks}"] if policy_ticks else []
    drivers += [f"operator {report.operator_ticks}"] if report.operator_ticks else []
    rate = report.ticks / max(report.seconds, 1e-3)
    return (
        f"#{report.index} {report.info.stage} · {result} · return {report.return_:.1f} · "
        f"{report.ticks} ticks: {', '.join(drivers)} · {rate:.0f} Hz"
    )


def _kind(text: str) -> str:
    """What a message is when its numbers are not looked at."""
    return re.sub(r"[\d.]+", "#", text)


def _policy(version: int) -> str:
    """A policy that is none of the run's has no version (rollout.policy=openpi)."""
    return f"policy v{version}" if version >= 0 else "policy"
