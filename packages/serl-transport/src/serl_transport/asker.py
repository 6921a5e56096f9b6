"""Asks one question at a time on a socket of its own, in the caller's thread: the shortest way there and back.

    infer() ─▶ Asker.ask ─▶ AskLine ─▶ gateway         on its own host: a Unix socket and shared memory (same_host.py)
                     └────▶ DEALER ─▶ learner          otherwise
                     busy, not connected, not let in yet: None, and the link asks

A question over `link.Link` is handed to the link's thread, and its answer back: two more wake-ups, a good part of a
round trip's time. The Asker says hello when it must, and repeats a question whose connection was cut, as the link does.
"""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from serl_transport.connection.link import Link
from serl_transport.connection.watch import Watch
from serl_transport.contract.errors import Corrupt, HelloRequired, ServerSilent, WireError
from serl_transport.same_host import AskLine, machine_id
from serl_transport.security import auth
from serl_transport.security.keys import ClientKeys
from serl_transport.wire.codec import Frames, pack, unpack
from serl_transport.wire.envelope import PROTOCOL, REPLY, Envelope
from serl_transport.wire.multipart import receive_parts, send_parts

log = logging.getLogger(__name__)

HELLO_S = 1.0  # a hello that is not answered by then is given up; the link tells why
LOOK_MS = 50  # how often a waiting question looks whether its connection was cut, or the client is being stopped


class Asker:
    """Owns one DEALER. Thread-safe: whoever finds it busy is sent to the link."""

    def __init__(
        self,
        link: Link,
        *,
        actor_id: str,
        boot_id: str,
        hello: Callable[[], dict[str, Any]],
        keys: ClientKeys | None,
        same_host: bool = False,
    ):
        """`link` asks in its place, and lives longer. `same_host`: a gateway of this host may offer a line."""
        self._link, self._limits = link, link.limits
        self._actor_id, self._boot_id, self._hello = actor_id, boot_id, hello
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._closing = self._let_in = False
        self._keys = keys
        self._machine = machine_id() if same_host else ""
        self._line: AskLine | None = None
        self._open()

    def ask(self, kind: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """The reply's body; None when nothing was asked here and the link should.

        Raises the server's typed error, or ServerSilent after `timeout_s`.
        """
        if self._closing or not self._lock.acquire(blocking=False):
            return None
        try:
            frames = self._ask(kind, pack(body, self._limits), time.monotonic() + timeout_s)
        except TimeoutError:
            late = f"no reply to {kind!r} from {self._link.endpoint} in {timeout_s * 1e3:g} ms"
            raise ServerSilent(f"{late}; {self._link.state()}") from None
        finally:
            self._lock.release()
        return None if frames is None else unpack(frames, self._limits) if frames else {}

    def close(self) -> None:
        """Fail the question that is under way and close the socket."""
        self._closing = True
        with self._lock:
            self._hang_up()
            self._watch.close()

    @property
    def over_line(self) -> bool:
        """Whether questions go over a line of this host."""
        line = self._line
        return line is not None and line.answered

    def _open(self) -> None:
        self._socket = self._link.context.socket(zmq.DEALER)
        auth.configure(self._socket, self._limits, self._keys)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._wait_ms = 0  # the socket's RCVTIMEO, as it was last set
        self._watch = Watch(self._socket)
        self._socket.connect(self._link.endpoint)

    def _ask(self, kind: str, frames: Frames, deadline: float) -> Frames | None:
        """The reply's frames, or None when the question could not be sent the first time."""
        answer = self._ask_on_line(kind, frames, deadline)
        if answer is not None:
            return answer
        asked, request_id = False, None
        while True:
            if request_id is None:
                self._notice_cuts()
                if self._let_in or self._say_hello(min(deadline, time.monotonic() + HELLO_S)):
                    request_id = self._send(kind, frames)
                if request_id is None:
                    if self._watch.hopeless:
                        self._watch.close()
                        self._open()
                    if not asked:
                        return None
                    self._pause(deadline)
                    continue
                asked = True
            reply = self._receive(deadline)
            if reply is None:
                request_id = None  # the connection was cut, and the question with it
            elif reply[0].request_id == request_id:
                answer = self._read(*reply)
                if answer is not None:
                    return answer
                request_id = None

    def _ask_on_line(self, kind: str, frames: Frames, deadline: float) -> Frames | None:
        """The reply's frames; None when the question must go over TCP."""
        line = self._line
        if line is None or kind != "infer":
            return None
        try:
            request_id = next(self._ids)
            if not line.ready or not line.send(request_id, frames):
                return None
            reply = None
            while reply is None or reply.request_id != request_id:  # another: of a question that could not wait
                self._pause(deadline, 0)
                reply = line.receive(min(LOOK_MS / 1e3, deadline - time.monotonic()))
            if reply.error is not None:
                raise WireError.from_code(*reply.error)
        except HelloRequired:
            self._let_in = False
            self._hang_up()
            return None
        except EOFError:
            # A line that has served and is gone is asked for again; one that never did would only delay each question.
            self._let_in = self._let_in and not line.answered
            self._hang_up()
            return None
        return reply.frames

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _read(self, envelope: Envelope, frames: Frames) -> Frames | None:
        """The answer; None when the question must be asked again."""
        try:
            envelope.raise_error()
        except HelloRequired:
            self._let_in = False
            return None
        except Corrupt:
            return None
        return frames

    def _say_hello(self, until: float) -> bool:
        self._hang_up()
        body = self._hello() | ({"machine": self._machine} if self._machine else {})
        request_id = self._send("hello", pack(body, self._limits))
        if request_id is None:
            return False
        try:
            while (reply := self._receive(until)) is not None:
                if reply[0].request_id == request_id:
                    self._let_in = reply[0].error is None and reply[0].version == PROTOCOL
                    if self._let_in and self._machine and reply[1]:
                        self._line = AskLine.connect(unpack(reply[1], self._limits).get("line"))
                    break
        except TimeoutError:
            return False
        return self._let_in

    def _send(self, kind: str, frames: Frames) -> int | None:
        """The request id; None without a connection."""
        envelope = Envelope(kind, self._actor_id, self._boot_id, 0, next(self._ids))
        try:
            send_parts(self._socket, [envelope.to_frame(frames), *frames])
        except zmq.Again:
            return None
        return envelope.request_id  # type: ignore[return-value]  (an int, made here)

    def _receive(self, deadline: float) -> tuple[Envelope, Frames] | None:
        """The next whole message; None when the connection was cut. TimeoutError at the deadline."""
        while True:
            self._pause(deadline, 0)
            self._wait_at_most(deadline - time.monotonic())
            try:
                # Waiting in `recv` is a poll of two sockets less than asking a poller first.
                parts = receive_parts(self._socket, wait=True)
                envelope = Envelope.from_frame(parts[0])
                envelope.check(parts[1:])
            except zmq.Again:
                if self._notice_cuts():
                    return None
                continue
            except WireError as error:
                log.error("a bad message from %s: %s", self._link.endpoint, error.message)
                continue
            if envelope.kind == REPLY or envelope.version != PROTOCOL:
                return envelope, parts[1:]

    def _wait_at_most(self, seconds: float) -> None:
        wait_ms = min(LOOK_MS, max(1, math.ceil(seconds * 1e3)))
        if wait_ms != self._wait_ms:
            self._socket.setsockopt(zmq.RCVTIMEO, wait_ms)
            self._wait_ms = wait_ms

    def _notice_cuts(self) -> bool:
        cut = self._watch.look()
        self._let_in = self._let_in and not cut
        return cut

    def _pause(self, deadline: float, rest_s: float = 0.02) -> None:
        if self._closing or time.monotonic() >= deadline:
            raise TimeoutError
        if rest_s:
            time.sleep(rest_s)
