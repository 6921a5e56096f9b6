"""Inference through the gateway: an actor's frames go to the policy server and its answer comes back, both unread.

    actor, or a role that speaks for one ─▶ infer ─▶ [in flight] ─▶ policy server ─▶ infer_reply ─▶ who asked

A forwarded question carries this host's monotonic time of arrival, in nanoseconds, in its envelope's seq: deadlines run
from there, not from when a busy policy server came to read it.

The policy server registers by its `serving` report, once a second. When it falls silent, or another process takes its
place, whatever is in flight is answered with `not_ready`, so that no actor waits for a dead process.
"""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from serl_launcher.run.internal import INFER
from serl_transport.connection.router import Peer, Reply, Router
from serl_transport.contract.errors import NotReady, WireError
from serl_transport.wire.codec import Frames
from serl_transport.wire.envelope import Envelope

log = logging.getLogger("gateway")
Answer = Callable[[bytes, Reply], None]
SILENT_S = 5.0
ASKING = 64  # unanswered questions of one actor; it asks one or two at a time


class InferForwarder:
    """roles: the internal router."""

    def __init__(self, roles: Router) -> None:
        self._roles = roles
        self._server: bytes | None = None  # the policy server's address
        self._pid: Any = None
        self._last = 0.0
        # our token -> how to answer, token of who asked, its name
        self._in_flight: dict[bytes, tuple[Answer, bytes, str]] = {}
        self._asking: Counter[str] = Counter()  # name -> its questions in flight
        self._ids = itertools.count(1)
        self._serving: dict[str, Any] = {}

    def infer(self, answer: Answer, peer: Peer, envelope: Envelope, frames: Frames) -> None:
        """An actor asks, or a role for somebody behind it (the openpi server). NotReady when nobody serves."""
        if self._server is None:
            raise NotReady("no policy server is running yet (or it is restarting); ask again")
        if self._asking[envelope.actor_id] >= ASKING:
            raise NotReady(f"{ASKING} questions of {envelope.actor_id!r} are unanswered; ask again")
        token = next(self._ids).to_bytes(8)
        self._in_flight[token] = (answer, envelope.token, envelope.actor_id)
        self._asking[envelope.actor_id] += 1
        question = Envelope(INFER, envelope.actor_id, seq=time.monotonic_ns(), request_id=token)
        self._roles.push(self._server, question, frames)

    def answered(self, peer: Peer, envelope: Envelope, frames: Frames) -> None:
        """The policy server answers; an answer to what was given up meanwhile is dropped."""
        token = envelope.request_id
        if not isinstance(token, bytes) or token not in self._in_flight:
            return
        answer, asker, name = self._in_flight.pop(token)
        self._asking[name] -= 1
        if not self._asking[name]:
            del self._asking[name]
        answer(asker, frames if envelope.error is None else WireError.from_code(*envelope.error))

    def serving(self, peer: Peer, body: dict[str, Any]) -> None:
        """The policy server is there; its figures go into the status."""
        if (peer.address, body.get("pid")) != (self._server, self._pid):
            log.info("policy server %s serves", body.get("pid"))
            self._give_up("the policy server was replaced; ask again")
        self._server, self._pid, self._last = peer.address, body.get("pid"), time.monotonic()
        self._serving = {key: value for key, value in body.items() if key != "pid"}

    def check(self) -> None:
        """Give up on a silent policy server; call once a second."""
        if self._server is not None and time.monotonic() - self._last > SILENT_S:
            log.warning("the policy server has been silent for %.0f s", SILENT_S)
            self._server = None
            self._give_up("the policy server fell silent; ask again")

    def to_status(self) -> dict[str, Any]:
        """The `serving` part of the status document."""
        return {**self._serving, "alive": self._server is not None}

    def _give_up(self, why: str) -> None:
        waiting, self._in_flight = self._in_flight, {}
        self._asking.clear()
        for answer, asker, _ in waiting.values():
            answer(asker, NotReady(why))
