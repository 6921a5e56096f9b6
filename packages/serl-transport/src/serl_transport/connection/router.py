"""One ROUTER socket and its handlers: every message in, every typed reply out.

    peer ─▶ [envelope, *body] ─▶ limits ─▶ version ─▶ hello? ─▶ handler(peer, envelope, body) ─▶ reply now
                                    └────────┴─────────┴─▶ typed error                └─ None: reply(token, …) later

`TrainerServer` has one on its TCP port; a gateway adds another on an ipc endpoint for its own roles. A message can
cost its sender an error, never the loop its life.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from serl_transport.connection.replay_guard import ReplayWindow
from serl_transport.contract.errors import (
    BadFrame,
    CannotListen,
    Corrupt,
    HelloRequired,
    Internal,
    NotReady,
    ProtocolMismatch,
    Refused,
    Unauthorized,
    UnknownKind,
    WireError,
)
from serl_transport.contract.specs import new_boot_id
from serl_transport.security import auth
from serl_transport.security.keys import ServerKeys
from serl_transport.wire.codec import DEFAULT_LIMITS, Frames, Limits, check_sizes, pack, unpack
from serl_transport.wire.envelope import PROTOCOL, REPLY, Envelope
from serl_transport.wire.loop import EventLoop

log = logging.getLogger(__name__)

Reply = dict[str, Any] | WireError | Frames
Handler = Callable[["Peer", Envelope, Any], Reply | None]
PEERS = 4096  # connections that have said hello
PEERS_OF_ACTOR = 64  # of one name: two, and what a flapping link left behind within peer_timeout_s
_BURST = 64  # messages taken from the socket before timers and other sockets get their turn


@dataclass(slots=True)
class Peer:
    """One connection. An actor has two: its control link and its data link, with the same actor_id and boot_id."""

    address: bytes  # the router's routing id; changes when the peer reconnects
    actor_id: str = ""  # from its hello, or its last message when no hello is needed
    boot_id: str = ""
    last_seen: float = 0.0  # time.monotonic() of its last message
    session: str | None = None  # names its spool, as its hello said
    host: str | None = None  # where it runs, for people
    role: str = "actor"  # as its hello said: actor, or operator (which asks and pushes nothing); retired: see sessions
    window: ReplayWindow = field(default_factory=ReplayWindow)  # request ids it has used
    key: bytes = b""  # the public key (Z85) of its connection, where there are keys


class Router:
    """Owns one ROUTER socket in `loop`. All methods but `reply` belong to the loop's thread."""

    def __init__(
        self,
        loop: EventLoop,
        context: zmq.Context,
        *,
        limits: Limits = DEFAULT_LIMITS,
        require_hello: bool = False,
        boot_id: str | None = None,
        keys: ServerKeys | None = None,
        permit: Callable[[bytes, Envelope], None] | None = None,
    ):
        """`permit(public key, envelope)` raises Unauthorized for what a key may not do; given together with `keys`."""
        self.peers: dict[bytes, Peer] = {}
        self.counters: Counter[str] = Counter()  # messages by kind, errors by code
        self.boot_id = boot_id or new_boot_id()  # tells clients that the server restarted
        self.limits = limits
        self._loop = loop
        self._require_hello = require_hello
        self._permit = permit
        self._checked = require_hello  # peers across a network: checksums on everything
        self._handlers: dict[str, tuple[Handler, bool]] = {}
        self.socket = context.socket(zmq.ROUTER)
        auth.configure(self.socket, limits, keys)

    def bind(self, endpoint: str, complaint: str = "") -> str:
        """Listen on `endpoint` and return it with the actual port. CannotListen says why not, and `complaint`."""
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise CannotListen(
                f"cannot listen on {endpoint}: {zmq.strerror(error.errno or 0)}. {complaint}".rstrip(". ")
            ) from None
        self._loop.add_socket(self.socket, self._receive)
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def handle(self, kind: str, fn: Handler, *, raw: bool = False) -> None:
        """Let `fn(peer, envelope, body)` answer messages of `kind`; with `raw` it gets the body's frames unread.

        It returns a body, a WireError, frames (forwarded unread), or None to answer later with
        `reply(envelope.token, ...)`. It may raise a WireError.
        """
        self._handlers[kind] = (fn, raw)

    def reply(self, token: bytes, result: Reply) -> None:
        """Answer the message that `token` came with: a body, a WireError, or a body's frames. Thread-safe.

        Frames are sent as they lie, without a copy: their memory must not change any more.
        """
        self._reply(*_read_token(token), result)

    def _reply(self, address: bytes, request_id: int | bytes, result: Reply) -> None:
        error, frames = None, []
        if isinstance(result, WireError):
            self.counters[result.code] += 1
            error = (result.code, result.message)
        else:
            frames = result if isinstance(result, list) else pack(result, self.limits)
        envelope = Envelope(REPLY, boot_id=self.boot_id, request_id=request_id, error=error)
        parts = [address, envelope.to_frame(frames if self._checked else None), *frames]
        self._send_anywhere(parts, copy=not isinstance(result, list))

    def push(self, address: bytes, envelope: Envelope, frames: Frames) -> None:
        """Send an unasked message to a peer, for example forwarded work to a role. Thread-safe.

        A peer that has gone loses the message, silently: use replies or timeouts to notice.
        """
        self._send_anywhere([address, envelope.to_frame(), *frames], copy=False)

    def forget_silent(self, timeout_s: float) -> None:
        """Drop the state of connections that said nothing for `timeout_s`."""
        oldest = time.monotonic() - timeout_s
        for address in [address for address, peer in self.peers.items() if peer.last_seen < oldest]:
            self.forget(address)

    def make_room(self, peer: Peer, name: str) -> None:
        """Before `peer` is remembered as `name`. NotReady when the connections of all names are too many.

        Of too many of one name, the one that is silent for longest has to say hello again.
        """
        mine = [other for other in self.peers.values() if other.actor_id == name]
        if len(mine) >= PEERS_OF_ACTOR and peer.address not in self.peers:
            self.forget(min(mine, key=lambda other: other.last_seen).address)
        if len(self.peers) >= PEERS and peer.address not in self.peers:
            raise NotReady(f"this learner has {PEERS} connections, as many as it serves; ask again")

    def actors_named(self, name: str, but: str) -> list[Peer]:
        """Connections that said hello as actor `name`, those of boot `but` aside."""
        return [p for p in self.peers.values() if p.actor_id == name and p.role == "actor" and p.boot_id != but]

    def is_connected(self, address: bytes) -> bool:
        """Is there still a connection behind `address`? A process that died has none; a cut link is noticed later."""
        # An answer to nothing: its receiver ignores it, and with ROUTER_MANDATORY sending it says whether there is one.
        parts = [address, Envelope(REPLY, boot_id=self.boot_id).to_frame([])]
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        finally:
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 0)
        return True

    def forget(self, address: bytes) -> None:
        """Let that connection say hello again before anything else."""
        self.peers.pop(address, None)

    def close(self) -> None:
        """Close the socket, after the loop has ended."""
        self.socket.close()

    def _send_anywhere(self, parts: Frames, copy: bool) -> None:
        if self._loop.in_loop:
            self._send(parts, copy)
        else:
            self._loop.call_soon(lambda: self._send(parts, copy))

    def _send(self, parts: Frames, copy: bool) -> None:
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK, copy=copy)
        except zmq.ZMQError as error:
            self.counters["send_failed"] += 1
            log.warning("a reply could not be sent: %s", error)

    def _receive(self) -> None:
        for _ in range(_BURST):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._dispatch(parts[0].bytes, parts[1:])
            if self.socket.closed:
                return

    def _dispatch(self, address: bytes, parts: Frames) -> None:
        """Answer one message; whatever goes wrong becomes a typed error of its sender."""
        request_id: int | bytes = 0
        try:
            if not parts:
                raise BadFrame("a message starts with an envelope, got no frame")
            envelope = Envelope.from_frame(parts[0])
            request_id = envelope.request_id
            token = _token(address, request_id)
            result = self._answer(address, envelope, token, parts)
            if result is not None:
                self._reply(address, request_id, result)
        except WireError as error:
            self._reply(address, request_id, error)
        except Exception as error:
            self._reply(address, request_id, _failed(error))

    def _answer(self, address: bytes, envelope: Envelope, token: bytes, parts: Frames) -> Reply | None:
        if envelope.version != PROTOCOL and address in self.peers:
            raise Corrupt("the message was changed on its way (protocol version): send it again")
        if envelope.version != PROTOCOL:
            raise ProtocolMismatch(
                f"the learner speaks protocol {PROTOCOL}, this peer {envelope.version}; "
                "install the same release on both sides"
            )
        envelope.check(parts[1:])
        key = b""
        if self._permit is not None:
            key = frame_key(parts[0])
            self._permit(key, envelope)
        handler, raw = self._handlers.get(envelope.kind, (None, False))
        if handler is None:
            raise UnknownKind(f"no handler for {envelope.kind!r}; the kinds are {sorted(self._handlers)}")
        self.counters[envelope.kind] += 1
        frames = parts[1:]
        peer = self._peer(address, envelope)
        peer.key = key
        _check_role(peer, envelope.kind)
        if frames and raw:
            check_sizes(frames, self.limits)
        body = frames if raw else (unpack(frames, self.limits) if frames else {})
        envelope.token = token
        return handler(peer, envelope, body)

    def _peer(self, address: bytes, envelope: Envelope) -> Peer:
        peer = self.peers.get(address)
        if peer is None:
            if self._require_hello and envelope.kind != "hello":
                raise HelloRequired("this connection has not said hello (the learner restarted or the link was cut)")
            peer = Peer(address, envelope.actor_id, envelope.boot_id)
            # A hello is remembered by its handler, once it has been accepted.
            if envelope.kind != "hello":
                self.peers[address] = peer
        if self._require_hello and envelope.actor_id != peer.actor_id:
            raise Unauthorized(f"this connection said hello as {peer.actor_id!r}, not as {envelope.actor_id!r}")
        if self._require_hello and not _is_fresh(peer, envelope):
            raise Refused(f"message {envelope.request_id} of this connection was handled before: nothing is replayed")
        peer.last_seen = time.monotonic()
        return peer


def frame_key(frame: Any) -> bytes:
    """The public key (Z85) that the authenticator attached to the sender's connection; empty without one."""
    try:
        return frame.get("User-Id").encode()
    except zmq.ZMQError:
        return b""


def _check_role(peer: Peer, kind: str) -> None:
    if peer.role in ("operator", "follower") and kind in ("data", "infer"):
        raise Unauthorized(f"this connection said hello with role {peer.role}; {kind} is an actor's")
    if peer.role == "retired" and kind not in ("hello", "heartbeat", "data"):
        raise Refused("another process has taken over this actor's name; this one may only deliver what it has")


def _is_fresh(peer: Peer, envelope: Envelope) -> bool:
    """Data has its own, lasting deduplication, and a link repeats it with the same id."""
    if envelope.kind == "data":
        return True
    request_id = envelope.request_id
    return type(request_id) is not int or request_id < 1 or peer.window.accept(request_id)


def _token(address: bytes, request_id: int | bytes) -> bytes:
    """An opaque return address: it may travel through other processes and come back."""
    return msgpack.packb([address, request_id])


def _read_token(token: bytes) -> tuple[bytes, int | bytes]:
    """(address, request id)."""
    try:
        address, request_id = msgpack.unpackb(token)
    except Exception:
        raise BadFrame("a return token is not one of ours") from None
    if type(address) is not bytes or type(request_id) not in (int, bytes):
        raise BadFrame("a return token is not one of ours")
    return address, request_id


def _failed(error: Exception) -> Internal:
    log.exception("the handler of a message failed")
    return Internal(f"the learner failed on this message, see its log: {type(error).__name__}")
