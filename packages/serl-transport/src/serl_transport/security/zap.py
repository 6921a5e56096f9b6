"""Answers libzmq's question "may this key connect?" (ZAP, ZeroMQ RFC 27), in the server's own event loop.

    peer's handshake ─▶ libzmq ─▶ inproc ZAP socket ─▶ allow-list ─▶ 200 with the key as User-Id, or 400

libzmq admits everybody when its handler is gone (seen with a stopped authenticator thread), so nothing here may die
alone: the handler lives in the loop that serves the sockets, sockets enforce the domain, and when the ZAP socket
itself fails `on_death` closes them.
"""

import logging
from collections.abc import Callable

import zmq
from zmq.utils import z85

from serl_transport.security.allow_list import AllowList
from serl_transport.wire.loop import EventLoop

log = logging.getLogger(__name__)

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = "flowserl"
_CHECK_S = 0.5


class Authenticator:
    """Owns the ZAP socket of one context. Create it before the sockets it guards are bound."""

    def __init__(self, loop: EventLoop, context: zmq.Context, allow_list: AllowList, on_death: Callable[[], None]):
        self.admitted = self.refused = 0  # handshakes
        self._loop, self._allow_list, self._on_death = loop, allow_list, on_death
        self._dead = False
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)
        loop.add_socket(self.socket, self._receive)
        loop.every(_CHECK_S, self._check)

    def close(self) -> None:
        """Close the socket; only after the guarded ones."""
        self._dead = True
        self.socket.close()

    def _check(self) -> None:
        if self.socket.closed and not self._dead:
            self._die("its socket was closed")

    def _receive(self) -> None:
        while True:
            try:
                address, empty, version, request_id, *rest = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                self._die(str(error))
                return
            except ValueError:
                continue  # not a ZAP request; libzmq never sends such
            status, text, user = self._judge(version, rest)
            self.socket.send_multipart([address, empty, b"1.0", request_id, status, text, user, b""])

    def _judge(self, version: bytes, rest: list[bytes]) -> tuple[bytes, bytes, bytes]:
        try:
            domain, _, _, mechanism, *credentials = rest
            if (version, domain, mechanism) != (b"1.0", DOMAIN.encode(), b"CURVE") or len(credentials) != 1:
                self.refused += 1
                return b"400", b"expected CURVE", b""
            key = z85.encode(credentials[0])
            entry = self._allow_list.lookup(key)
        except Exception:
            log.exception("a handshake could not be judged, so it is refused")
            self.refused += 1
            return b"500", b"internal", b""
        if entry is None:
            self.refused += 1
            if self.refused in (1, 10, 100) or self.refused % 1000 == 0:
                log.warning("refused a key that is not in %s (%d so far)", self._allow_list.path, self.refused)
            return b"400", b"this key is not in the allow-list", b""
        self.admitted += 1
        return b"200", b"", key

    def _die(self, why: str) -> None:
        self._dead = True
        log.critical("the authenticator failed (%s): closing every socket it guards", why)
        self._on_death()
