"""Inference through the gateway: an actor's frames go to the policy server and its answer comes back, both unread.

    actor, or a role that speaks for one ─▶ infer ─▶ [in flight] ─▶ policy server ─▶ infer_reply ─▶ who asked
                                      images: shared memory (gateway.shelf), the rest: gateway.line or the ipc socket
                                      (of an actor on this host they lie in shared memory already: gateway.actor_lines)

A forwarded question carries this host's monotonic time of arrival, in nanoseconds, in its envelope's seq: deadlines run
from there, not from when a busy policy server came to read it.

The policy server registers by its `serving` report, once a second. When it falls silent, or another process takes its
place, whatever is in flight is answered with `not_ready`, so that no actor waits for a dead process.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serl_launcher.gateway.line import LineDesk
from serl_launcher.gateway.shelf import Shelf
from serl_launcher.run.internal import FORGET, INFER, INFER_REPLY
from serl_transport.connection.router import Peer, Reply, Router
from serl_transport.contract.errors import NotReady, WireError
from serl_transport.wire.codec import Frames
from serl_transport.wire.envelope import Envelope
from serl_transport.wire.loop import EventLoop

log = logging.getLogger("gateway")
Answer = Callable[[bytes, Reply], None]
SILENT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question that the policy server has."""

    answer: Answer  # how to answer it
    token: bytes  # of who asked
    slot: int | None  # of the shelf


class InferForwarder:
    """roles: the internal router; reply: answers an actor by token; loop, run_dir: of the gateway."""

    def __init__(self, roles: Router, reply: Answer, loop: EventLoop, run_dir: Path) -> None:
        self._roles = roles
        self._desk = LineDesk(run_dir, loop, self._told)
        self._reply = reply
        self._server: bytes | None = None  # the policy server's address
        self._pid: Any = None
        self._last = 0.0
        self._in_flight: dict[bytes, _Asked] = {}  # by our token
        self._shelf = Shelf()
        self._ids = itertools.count(1)
        self._serving: dict[str, Any] = {}

    def infer(self, peer: Peer, envelope: Envelope, frames: Frames) -> None:
        """An actor asks. Raises NotReady when nobody serves."""
        self._forward(envelope, frames, self._reply)

    def infer_for_role(self, peer: Peer, envelope: Envelope, frames: Frames) -> None:
        """A role asks for somebody behind it (the openpi server). Raises NotReady when nobody serves."""
        self._forward(envelope, frames, self._roles.reply)

    def infer_placed(self, actor: str, where: str, note: bytes, answer: Answer) -> None:
        """An actor of this host asks; its frames lie `where` the note says. Raises NotReady when nobody serves."""
        self._need_server()
        self._push(actor, where, [note], _Asked(answer, b"", None))

    def forget_memory(self, where: str) -> None:
        """Nobody will ask from there any more."""
        self._desk.send(self._pid, Envelope(FORGET, target=where), [])

    def _forward(self, envelope: Envelope, frames: Frames, answer: Answer) -> None:
        self._need_server()
        placed = self._shelf.put(frames)
        slot, where = None, ""
        if placed is not None:
            slot, note = placed
            frames, where = [note], self._shelf.where
        self._push(envelope.actor_id, where, frames, _Asked(answer, envelope.token, slot))

    def _need_server(self) -> None:
        if self._server is None:
            raise NotReady("no policy server is running yet (or it is restarting); ask again")

    def _push(self, actor: str, where: str, frames: Frames, asked: _Asked) -> None:
        assert self._server is not None
        token = next(self._ids).to_bytes(8)
        self._in_flight[token] = asked
        forwarded = Envelope(INFER, actor, seq=time.monotonic_ns(), request_id=token, target=where)
        if not self._desk.send(self._pid, forwarded, frames):
            self._roles.push(self._server, forwarded, frames)

    def close(self) -> None:
        """Hang up, after the loop has ended."""
        self._desk.close()

    def _told(self, envelope: Envelope, frames: Frames) -> None:
        if envelope.kind == INFER_REPLY:
            self._answered(envelope, frames)
        else:
            log.error("a policy server sent %r over its line, and only answers are expected", envelope.kind)

    def answered(self, peer: Peer, envelope: Envelope, frames: Frames) -> None:
        """The policy server answers; an answer to what was given up meanwhile is dropped."""
        self._answered(envelope, frames)

    def _answered(self, envelope: Envelope, frames: Frames) -> None:
        token = envelope.request_id
        if not isinstance(token, bytes) or token not in self._in_flight:
            return
        error = envelope.error
        self._settle(self._in_flight.pop(token), frames if error is None else WireError.from_code(*error))

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
        for asked in waiting.values():
            self._settle(asked, NotReady(why))

    def _settle(self, asked: _Asked, result: Reply) -> None:
        if asked.slot is not None:
            self._shelf.free(asked.slot)
        asked.answer(asked.token, result)
