"""Who is connected: the gateway's memory of each actor, fed by every message, read by tickets, closing and status."""

import logging
import re
import time
from dataclasses import dataclass
from typing import Any

from serl_transport.contract.bounds import INT32, INT64, check_name, check_whole, printable, shown
from serl_transport.contract.errors import NotReady, SchemaMismatch

log = logging.getLogger("gateway")
LONGEST = 300  # characters of what an actor says of itself
ACTORS = 1024  # names that are known at a time


@dataclass(slots=True)
class ActorState:
    """One unique_identifier."""

    boot: str  # its newest process
    last_seen: float  # time.monotonic()
    policy_version: int = -1  # that acted last, from its data
    backlog: int | None = None  # unacknowledged items, as it said
    mode: str | None = None  # demo | online | eval, as it said
    delivered: bool = False  # this boot has delivered data of its own: its spool's older items came before
    lost: bool = False  # silence was reported
    trouble: str | None = None  # what keeps its robot from working, as it said
    asks: bool = False  # it has asked for tickets
    dismissed: bool = False  # it was told to stop, with nothing left to deliver
    rollout: str | None = None  # what people changed of its `rollout` and holds there, as it said
    left: str | None = None  # why it left, as it said
    worked: float = 0.0  # time.monotonic() of the last data of it that was kept


class Actors:
    """dead_after_s: silence after which an actor is taken for dead."""

    def __init__(self, dead_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._started = time.monotonic()
        self._known: dict[str, ActorState] = {}

    def joined(self, actor: str, boot: str) -> None:
        """A hello was accepted (each of an actor's connections says one). NotReady: too many are there."""
        state = self._known.get(actor)
        if state is None:
            self._make_room()
        if state is None or state.boot != boot:
            log.info("actor %s %s (boot %s)", actor, "joined" if state is None else "restarted", boot[-8:])
            self._known[actor] = ActorState(boot, time.monotonic(), asks=state is not None and state.asks)
        self.seen(actor)

    def known(self) -> dict[str, ActorState]:
        """By unique_identifier."""
        return self._known

    def asked(self, actor: str, backlog: Any) -> int:
        """It asks what to do next; its backlog, as it says. SchemaMismatch when that is none."""
        state = self._known.get(actor)
        if state is not None:
            state.asks = True
        try:
            return check_whole("backlog", 0 if backlog is None else backlog, 0, INT64)
        except ValueError as error:
            raise SchemaMismatch(f"next_episode: {error}") from None

    def dismissed(self, actor: str) -> None:
        """It was told that the run is over."""
        if actor in self._known:
            self._known[actor].dismissed = True

    def leaves(self, actor: str, boot: str, reason: Any) -> None:
        """It says goodbye, and why. SchemaMismatch when that is nothing to show."""
        text = _text("leave: reason", reason)
        state = self._known.get(actor)
        if state is not None and state.boot == boot:
            state.left = text
            log.info("actor %s leaves: %s", actor, text)

    def _make_room(self) -> None:
        if len(self._known) < ACTORS:
            return
        oldest = min(self._known, key=lambda name: self._known[name].last_seen)
        if not self._silent(self._known[oldest]):
            raise NotReady(f"{ACTORS} actors are here, as many as one learner knows; ask again")
        log.warning("more than %d actors: %s, silent for longest, is forgotten", ACTORS, oldest)
        del self._known[oldest]

    def seen(self, actor: str) -> ActorState | None:
        """Any message came from its connection."""
        state = self._known.get(actor)
        if state is not None:
            if state.lost:
                log.info("actor %s is back", actor)
                state.lost = False
            state.last_seen = time.monotonic()
        return state

    def heartbeat(self, actor: str, body: dict[str, Any]) -> None:
        """What it says of itself once a second. SchemaMismatch names what nobody could show."""
        state = self.seen(actor)
        if state is None:
            return
        backlog, mode, version = body.get("backlog"), body.get("mode"), body.get("policy_version")
        try:
            state.backlog = state.backlog if backlog is None else check_whole("backlog", backlog, 0, INT64)
            state.mode = state.mode if mode is None else check_name("mode", mode)
            state.policy_version = (
                state.policy_version if version is None else check_whole("policy_version", version, -1, INT32)
            )
        except ValueError as error:
            raise SchemaMismatch(f"heartbeat: {error}") from None
        if (trouble := body.get("trouble")) is not None:
            trouble = _text("heartbeat: trouble", trouble) or None
        if trouble and _kind(trouble) != _kind(state.trouble or ""):
            log.warning("actor %s: %s", actor, trouble)
        state.trouble = trouble
        rollout = body.get("rollout")
        state.rollout = None if rollout is None else _text("heartbeat: rollout", rollout)

    def delivered(self, actor: str, boot: str, version: int) -> None:
        """An item of `boot` is in the journal; version: that drove its last tick."""
        state = self._known.get(actor)
        if state is not None and state.boot == boot:
            state.delivered, state.policy_version, state.worked = True, version, time.monotonic()

    def alive(self, actor: str, boot: str) -> bool:
        """Is that process there? An actor unknown to this gateway gets the benefit of the doubt for a while."""
        state = self._known.get(actor)
        if state is None:
            return time.monotonic() - self._started < self._dead_after_s
        return state.boot == boot and not self._silent(state)

    def superseded(self, actor: str, boot: str) -> bool:
        """Has a newer process of this actor taken over and delivered what the old one left?"""
        state = self._known.get(actor)
        return state is not None and state.boot != boot and state.delivered

    def report_silence(self) -> None:
        """Log, once, each actor that has fallen silent."""
        for actor, state in self._known.items():
            if not state.lost and self._silent(state):
                state.lost = True
                log.warning("actor %s has been silent for %.0f s", actor, self._dead_after_s)

    def to_status(self, version_times: dict[int, float]) -> dict[str, dict[str, Any]]:
        """The `actors` part of the status document; version_times: version -> monotonic time of its publishing."""
        now = time.monotonic()
        return {
            actor: {
                "boot": state.boot,
                "policy_version": state.policy_version,
                "version_age_s": _age(version_times.get(state.policy_version), now),
                "last_seen_s": round(now - state.last_seen, 2),
                "backlog": state.backlog,
                "mode": state.mode,
                "trouble": state.trouble,
                "rollout": state.rollout,
                "left": state.left,
            }
            for actor, state in self._known.items()
        }

    def _silent(self, state: ActorState) -> bool:
        return time.monotonic() - state.last_seen > self._dead_after_s


def _text(what: str, text: Any) -> str:
    """What an actor says of itself, for people. SchemaMismatch when it is no text."""
    if not isinstance(text, str):
        raise SchemaMismatch(f"{what}: expected a text, got {shown(text)}")
    return printable(text)[:LONGEST]


def _kind(text: str) -> str:
    """The text without its numbers, which change while a trouble lasts."""
    return re.sub(r"[\d.]+", "#", text)


def _age(published: float | None, now: float) -> float | None:
    return None if published is None else round(max(0.0, now - published), 2)
