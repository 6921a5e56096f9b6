"""Who is connected: the gateway's memory of each actor, fed by every message, read by tickets, closing and status."""

import logging
import time
from dataclasses import dataclass
from typing import Any

from serl_transport.contract.bounds import INT32, INT64, check_name, check_whole
from serl_transport.contract.errors import NotReady, SchemaMismatch

log = logging.getLogger("gateway")
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
            self._known[actor] = ActorState(boot, time.monotonic())
        self.seen(actor)

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

    def delivered(self, actor: str, boot: str, version: int) -> None:
        """An item of `boot` is in the journal; version: that drove its last tick."""
        state = self._known.get(actor)
        if state is not None and state.boot == boot:
            state.delivered, state.policy_version = True, version

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
            }
            for actor, state in self._known.items()
        }

    def _silent(self, state: ActorState) -> bool:
        return time.monotonic() - state.last_seen > self._dead_after_s


def _age(published: float | None, now: float) -> float | None:
    return None if published is None else round(max(0.0, now - published), 2)
