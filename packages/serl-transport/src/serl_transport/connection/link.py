"""One DEALER connection to a server, with its own thread: hello, heartbeats, messages and their replies.

    any thread ─ call() ──▶ call_soon ─▶ [pending: request id → message] ─▶ DEALER ─▶ server
                  ▲ event                          │ reply, or hello again and send all once more
                  └────────────────────────────────┘

`TrainerClient` has two, so that bulk data never delays an inference. A message is sent at least once: after a cut or a
restart of the server the link says hello again and repeats what is unanswered.
"""

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from serl_transport.connection.answer import Answer
from serl_transport.contract.errors import (
    Corrupt,
    HelloRequired,
    NotReady,
    ProtocolMismatch,
    SchemaMismatch,
    ServerSilent,
    Unauthorized,
    WireError,
)
from serl_transport.security import auth
from serl_transport.security.keys import ClientKeys
from serl_transport.wire.codec import DEFAULT_LIMITS, Frames, Limits, pack, unpack
from serl_transport.wire.envelope import PROTOCOL, REPLY, Envelope
from serl_transport.wire.loop import EventLoop

log = logging.getLogger(__name__)

OnReply = Callable[[Frames | WireError], None]
HELLO_AGAIN_S = 1.0
HEARTBEAT_S = 1.0
REOPEN_S = 5.0  # heartbeats have long noticed a dead connection, and libzmq has tried again several times


@dataclass(slots=True)
class _Pending:
    """A message without an answer yet."""

    envelope: Envelope  # with its request id
    frames: Frames  # of the body
    on_reply: OnReply  # called once, in the loop's thread
    repeat: bool = False  # send again when it stays unanswered: the server deduplicates it
    sent_at: float = 0.0  # time.monotonic(); 0: not sent on this connection
    again: bool = False  # it was taken for lost


class Link:
    """Owns one DEALER socket and the thread that serves it."""

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        actor_id: str,
        boot_id: str,
        hello: Callable[[], dict[str, Any]],
        heartbeat: Callable[[], dict[str, Any]],
        on_heartbeat: Callable[[dict[str, Any]], None] | None = None,
        resend_s: float | None = None,
        limits: Limits = DEFAULT_LIMITS,
        keys: ClientKeys | None = None,
    ):
        """`hello` and `heartbeat` make bodies; `on_heartbeat` gets the replies. ValueError for a malformed endpoint.

        `resend_s`: repeat a message that the server has passed over for so long (see `_is_lost`), and keep it while the
        server refuses this client (for messages that the server deduplicates); None: it waits for its caller's timeout,
        and fails on a refusal.
        """
        self.endpoint = endpoint
        self.loop = EventLoop()
        self.context = zmq.Context()
        self.ready = threading.Event()  # the server accepted our hello on this connection
        self.refused: WireError | None = None  # why the server refused our hello, while it does
        self.settled = threading.Event()  # ready, or refused
        self.hello_reply: dict[str, Any] = {}
        self._actor_id, self._boot_id = actor_id, boot_id
        self._hello, self._heartbeat, self._on_heartbeat = hello, heartbeat, on_heartbeat
        self._resend_s, self.limits = resend_s, limits
        self._ids = itertools.count(1)
        self._pending: OrderedDict[int, _Pending] = OrderedDict()
        self._on_ready: list[Callable[[], None]] = []
        self._on_restart: list[Callable[[], None]] = []
        self._server_boot = ""
        self._last_heard = self._last_hello = self._last_heartbeat = 0.0
        self._heartbeat_id = self._hello_id = 0
        self._answered_at = self._answered_sent = 0.0  # of what is repeated: the last answer, the newest one answered
        self._keys = keys
        self._opened = time.monotonic()
        try:
            self._open()
        except zmq.ZMQError as error:
            self._close()
            raise ValueError(
                f"cannot connect to {endpoint}: {zmq.strerror(error.errno or 0)}; check ip= and port="
            ) from None
        self.loop.call_later(0, self._tick)
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread: connect, say hello, keep trying."""
        self._thread.start()

    def stop(self) -> None:
        """Fail what is unanswered, close the socket, end the thread."""
        self.loop.stop()
        if self._thread.ident is None:
            self._close()
        else:
            self._thread.join()

    def call(self, kind: str, body: dict[str, Any], *, target: str = "", timeout_ms: float = 5000) -> dict[str, Any]:
        """Ask and wait for the reply's body. Raises the server's typed error, or ServerSilent after `timeout_ms`."""
        return self.ask(kind, body, target=target).result(timeout_ms / 1e3)

    def ask(self, kind: str, body: dict[str, Any], *, target: str = "") -> Answer:
        """Ask without waiting; several questions may be on their way. Thread-safe."""
        frames = pack(body, self.limits)
        envelope = self._envelope(kind, target)
        give_up = partial(self.loop.call_soon, partial(self.give_up, _id(envelope)))
        answer = Answer(kind, self.limits, give_up, self.endpoint, self.state)
        self.loop.call_soon(lambda: self._submit(envelope, frames, answer.take))
        return answer

    def submit(
        self, kind: str, frames: Frames, on_reply: OnReply, *, target: str = "", seq: int = 0, boot_id: str = ""
    ) -> None:
        """Send without waiting; `on_reply` gets the reply's frames or the typed error. In the loop's thread."""
        self._submit(self._envelope(kind, target, seq, boot_id), frames, on_reply, repeat=True)

    def on_ready(self, fn: Callable[[], None]) -> None:
        """Call `fn` in the loop's thread after each accepted hello."""
        self._on_ready.append(fn)

    def on_restart(self, fn: Callable[[], None]) -> None:
        """Call `fn` in the loop's thread when another process answers than before."""
        self._on_restart.append(fn)

    @property
    def silent_s(self) -> float:
        """Seconds since the server was last heard; infinite when never."""
        return time.monotonic() - self._last_heard if self._last_heard else float("inf")

    def state(self) -> str:
        """One phrase for messages to people."""
        if self.refused is not None:
            return f"it refused this client: {self.refused.message}"
        return f"last heard {self.silent_s:.1f} s ago" if self._last_heard else "it has never answered"

    # Everything below runs in the loop's thread.

    def _envelope(self, kind: str, target: str = "", seq: int = 0, boot_id: str = "") -> Envelope:
        return Envelope(kind, self._actor_id, boot_id or self._boot_id, seq, next(self._ids), target)

    def _submit(self, envelope: Envelope, frames: Frames, on_reply: OnReply, repeat: bool = False) -> None:
        pending = self._pending[_id(envelope)] = _Pending(envelope, frames, on_reply, repeat)
        if self.ready.is_set():
            self._send_pending(pending)
        elif self.refused is not None and self._resend_s is None:
            self._finish(_id(envelope), self.refused)

    def _send_pending(self, pending: _Pending) -> None:
        if self._transmit([pending.envelope.to_frame(pending.frames), *pending.frames]):
            pending.sent_at = time.monotonic()

    def _transmit(self, parts: Frames) -> bool:
        try:
            # Not copied: bodies are packed views that nobody changes, or bytes of the spool.
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False  # no connection, or a full queue: the tick tries again
        return True

    def _open(self) -> None:
        self._socket = self.context.socket(zmq.DEALER)
        auth.configure(self._socket, self.limits, self._keys, self.endpoint)
        self._watch_handshakes(self._keys is not None)
        # Queue only for a live connection: what was queued for a dead one would be lost or arrive before a hello.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.connect(self.endpoint)
        self.loop.add_socket(self._socket, self._receive)

    def _reopen(self, now: float) -> None:
        """A new socket in place of one that has been silent for REOPEN_S.

        libzmq gives a connection up for good, without trying again, when what arrives on it is not ZMTP (seen with one
        flipped bit in a frame's length): the old socket may never speak again.
        """
        self._opened = now
        for socket in (self._socket, self._monitor):
            self.loop.remove_socket(socket)
        self._socket.disable_monitor()
        self._socket.close()
        for pending in self._pending.values():
            pending.sent_at = 0.0
        self.ready.clear()
        self._last_hello = 0.0
        self._open()

    def _tick(self) -> None:
        now = time.monotonic()
        if now - max(self._last_heard, self._opened) > REOPEN_S:
            self._reopen(now)
        if not self.ready.is_set():
            if now - self._last_hello >= HELLO_AGAIN_S:
                self._say_hello(now)
        else:
            if now - self._last_heartbeat >= HEARTBEAT_S:
                self._beat(now)
            for pending in list(self._pending.values()):
                lost = self._is_lost(pending, now)
                pending.again = pending.again or lost
                if lost or not pending.sent_at:
                    self._send_pending(pending)
        self.loop.call_later(0.2 if self.ready.is_set() else 0.05, self._tick)

    def _is_lost(self, pending: _Pending, now: float) -> bool:
        """A slow server answers in order. Lost is what it passed over, or all of it when no answer came for so long.

        To repeat whatever is late would double the work of a server that is late because it has too much.
        """
        if self._resend_s is None or not pending.repeat:
            return False
        passed_over, idle = self._answered_sent - pending.sent_at, now - max(pending.sent_at, self._answered_at)
        return max(passed_over, idle) > self._resend_s

    def _say_hello(self, now: float) -> None:
        envelope = self._envelope("hello")
        frames = pack(self._hello(), self.limits)
        if self._transmit([envelope.to_frame(frames), *frames]):
            self._last_hello, self._hello_id = now, _id(envelope)
            self._pending[_id(envelope)] = _Pending(envelope, [], self._hello_answered, sent_at=now)

    def _hello_answered(self, result: Frames | WireError) -> None:
        self._forget_hellos()  # earlier ones were lost
        if isinstance(result, Corrupt | NotReady):
            log.warning("%s lets this client wait: %s", self.endpoint, result.message)
            return  # the next tick says it again; not ready: the server looks whether our name is taken
        if isinstance(result, WireError):
            self._refuse(result)
        else:
            self._accepted(unpack(result, self.limits) if result else {})

    def _forget_hellos(self) -> None:
        for request_id in [r for r, pending in self._pending.items() if pending.envelope.kind == "hello"]:
            del self._pending[request_id]

    def _accepted(self, reply: dict[str, Any]) -> None:
        self.hello_reply, self.refused = reply, None
        self.ready.set()
        self.settled.set()
        for pending in list(self._pending.values()):
            self._send_pending(pending)
        for fn in self._on_ready:
            fn()

    def _refuse(self, error: WireError) -> None:
        if self.refused is None or self.refused.message != error.message:
            log.error("%s refused this client: %s", self.endpoint, error.message)
        self.refused = error
        self.settled.set()
        if self._resend_s is None:
            for request_id in list(self._pending):
                self._finish(request_id, error)

    def _beat(self, now: float) -> None:
        self._last_heartbeat = now
        self._pending.pop(self._heartbeat_id, None)  # an unanswered one is not repeated
        envelope = self._envelope("heartbeat")
        self._heartbeat_id = _id(envelope)
        self._submit(envelope, pack(self._heartbeat(), self.limits), self._beaten)

    def _beaten(self, result: Frames | WireError) -> None:
        if isinstance(result, SchemaMismatch):
            log.warning("%s does not take this client's heartbeat: %s", self.endpoint, result.message)
        elif not isinstance(result, WireError) and result and self._on_heartbeat is not None:
            self._on_heartbeat(unpack(result, self.limits))

    def _receive(self) -> None:
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._handle(Envelope.from_frame(parts[0]), parts[1:])
            except WireError as error:
                log.error("a bad message from %s: %s", self.endpoint, error.message)

    def _handle(self, envelope: Envelope, frames: Frames) -> None:
        if envelope.version == PROTOCOL:
            envelope.check(frames)
        self._last_heard = time.monotonic()
        if envelope.version != PROTOCOL and self.ready.is_set():
            # A flipped bit, or a learner of another release since: its answer to a hello tells which.
            self.ready.clear()
            self._last_hello = 0.0
            raise Corrupt(f"a reply of protocol {envelope.version} from a learner that spoke {PROTOCOL}")
        if envelope.version != PROTOCOL:
            self._refuse(
                ProtocolMismatch(
                    f"the learner speaks protocol {envelope.version}, this client {PROTOCOL}; "
                    "install the same release on both sides"
                )
            )
        elif envelope.kind == REPLY:
            self._notice_restart(envelope.boot_id)
            self._take_reply(envelope, frames)
        else:
            log.error("%s sent %r, and only replies are expected", self.endpoint, envelope.kind)

    def _take_reply(self, envelope: Envelope, frames: Frames) -> None:
        request_id = envelope.request_id
        error = None if envelope.error is None else WireError.from_code(*envelope.error)
        if isinstance(error, HelloRequired):
            self._hello_is_required(request_id)
        elif request_id in self._pending:  # else answered before, or given up
            assert isinstance(request_id, int)
            self._finish(request_id, frames if error is None else error)

    def _hello_is_required(self, request_id: int | bytes) -> None:
        """Nothing was done with that message: hello again, then it goes out with the others.

        Also when nobody waits for it any more (a slow server answers a heartbeat after the next one was sent), but not
        when it was sent before the last accepted hello.
        """
        if isinstance(request_id, int) and request_id in self._pending:
            self._pending[request_id].sent_at = 0.0
        if self.ready.is_set() and isinstance(request_id, int) and request_id > self._hello_id:
            self.ready.clear()
            self._last_hello = 0.0
            self._say_hello(time.monotonic())

    def _watch_handshakes(self, has_keys: bool) -> None:
        """A server that refuses our key, or wants one, says so in the handshake only: make it a refusal in words."""
        events = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._monitor = monitor = self._socket.get_monitor_socket(events)

        def receive() -> None:
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refuse(Unauthorized("this client's key is not in the learner's allow-list"))
            elif event["value"] == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH and not self.hello_reply:
                wants = "takes no keys: unset security.keys_dir here, or give it" if has_keys else "wants keys: give"
                self._refuse(Unauthorized(f"the learner {wants} security.keys_dir"))

        self.loop.add_socket(monitor, receive)

    def _notice_restart(self, boot_id: str) -> None:
        if self._server_boot and boot_id != self._server_boot:
            log.warning("the learner at %s has restarted", self.endpoint)
            for fn in self._on_restart:
                fn()
        self._server_boot = boot_id

    def give_up(self, request_id: int) -> None:
        """Nobody waits for that reply any more; in the loop's thread."""
        self._pending.pop(request_id, None)

    def _finish(self, request_id: int, result: Frames | WireError) -> None:
        pending = self._pending.pop(request_id)
        if pending.repeat:
            self._answered_at = time.monotonic()
            self._answered_sent = max(self._answered_sent, 0.0 if pending.again else pending.sent_at)
        pending.on_reply(result)

    def _serve(self) -> None:
        try:
            self.loop.run()
        finally:
            self._close()

    def _close(self) -> None:
        self._forget_hellos()  # nobody refused this client
        for request_id in list(self._pending):
            self._finish(request_id, ServerSilent(f"the link to {self.endpoint} was closed"))
        self._socket.close()
        self.loop.close()
        self.context.destroy(linger=0)


def _id(envelope: Envelope) -> int:
    assert isinstance(envelope.request_id, int)
    return envelope.request_id
