"""The end of a run: whom the learner still waits for once nothing is left to do. Owned by the gateway.

    schedule done, or an operator's stop ─▶ no new tickets; open episodes are served to their end
      ─▶ an actor's backlog is empty ─▶ it is told to stop ─▶ nobody is waited for ─▶ the supervisor ends the run

Waited for is whoever has asked for tickets. Not any longer: who is silent for `dead_s`, and who is there and has
delivered nothing for `patience_s` (a person who does not come back, a driver that hangs, a disk that keeps nothing).
"""

import logging
import time
from typing import Any

from serl_launcher.gateway.actors import Actors, ActorState
from serl_launcher.gateway.tickets import TicketOffice, stop, wait

log = logging.getLogger("gateway")
WAIT_S = 0.2
SILENT_S = 3.0  # a heartbeat comes every second


class Ending:
    """Asked by the gateway: what an actor is told, and who is waited for. Times are time.monotonic()'s."""

    def __init__(self, actors: Actors, tickets: TicketOffice, dead_s: float) -> None:
        self._actors, self._tickets = actors, tickets
        self._dead_s, self._patience_s = dead_s, 2 * dead_s
        self._since: float | None = None  # when the run was over; None: it is not
        self._given_up: dict[str, str] = {}

    def answer(self, actor: str, backlog: int, reason: str) -> dict[str, Any]:
        """The reply to `next_episode` once the run is over: first what it recorded, then the stop."""
        if backlog:
            return wait(WAIT_S, f"{reason}; the last {backlog} step batches are on their way")
        self._actors.dismissed(actor)
        return stop(reason)

    def to_status(self, over: bool) -> dict[str, Any]:
        """The `ending` part of the status document: `waits_for` and `given_up`, actor -> text for people.

        over: nothing is left to do.
        """
        if not over:
            self._since, self._given_up = None, {}
            return {"waits_for": {}, "given_up": {}}
        self._since = time.monotonic() if self._since is None else self._since
        return {"waits_for": self._waits_for(self._since), "given_up": self._given_up}

    def _waits_for(self, since: float) -> dict[str, str]:
        now, found = time.monotonic(), {}
        working = {ticket.actor for ticket in self._tickets.open()}
        for name, state in self._actors.known().items():
            if not state.asks or state.dismissed or state.left is not None:
                continue
            if reason := self._gave_up(state, since, now):
                self._give_up(name, reason)
            elif now - state.last_seen <= self._dead_s:
                what = "makes its last episode" if name in working else "has not come back for its next episode"
                found[name] = what + self._silence(now - state.last_seen)
        for name in working - self._actors.known().keys():  # this gateway was started again in mid-episode
            found[name] = "has an episode open and has not come back yet"
        return found

    def _gave_up(self, state: ActorState, since: float, now: float) -> str | None:
        silent = now - state.last_seen
        if silent > self._dead_s:  # one that was gone before the end is no news
            return f"silent for {silent:.0f} s" if state.last_seen > since - self._dead_s else None
        idle = now - max(state.worked, since)
        return f"is there, and has delivered nothing for {idle:.0f} s" if idle > self._patience_s else None

    def _give_up(self, name: str, reason: str) -> None:
        if name not in self._given_up:
            log.warning("actor %s is not waited for any longer: %s", name, reason)
        self._given_up.setdefault(name, reason)

    def _silence(self, silent: float) -> str:
        return f", silent for {silent:.0f} s of {self._dead_s:g}" if silent > SILENT_S else ""
