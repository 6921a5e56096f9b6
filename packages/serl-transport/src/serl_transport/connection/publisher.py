"""The learner's notifications (5589): one PUB socket in the server's loop, bound anew when a key is revoked.

server.notify ─▶ send ─▶ PUB ─▶ every subscriber            allow-list lost a key ─▶ renew ─▶ all connect again
"""

import logging
import time
from typing import Any

import zmq

from serl_transport.contract.errors import CannotListen
from serl_transport.security import auth
from serl_transport.security.keys import ServerKeys
from serl_transport.wire.codec import Frames, Limits
from serl_transport.wire.loop import EventLoop

log = logging.getLogger(__name__)

REBIND_S = 0.1  # until the port is tried again: libzmq's own thread lets go of it a moment after a socket's close
REBIND_LATE_S = 5.0  # after which it is said that the port cannot be had


class Publisher:
    """Owns the socket. Made before `loop` runs; then its methods belong to the loop's thread."""

    def __init__(self, loop: EventLoop, context: zmq.Context, limits: Limits, keys: ServerKeys | None) -> None:
        self._loop, self._context, self._limits, self._keys = loop, context, limits, keys
        self._endpoint = ""
        self._ended = False
        self._socket = self._open()

    def bind(self, endpoint: str, complaint: str) -> str:
        """Listen on `endpoint` and return it with the actual port. CannotListen says why not, and `complaint`."""
        try:
            if "[" in endpoint:
                self._socket.setsockopt(zmq.IPV6, 1)
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise CannotListen(f"cannot listen on {endpoint}: {zmq.strerror(error.errno or 0)}. {complaint}") from None
        self._endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        return self._endpoint

    def send(self, frames: Frames) -> None:
        """Tell whoever listens."""
        if not self._socket.closed:  # else it is being renewed: everybody misses this one
            self._socket.send_multipart(frames, zmq.NOBLOCK)

    def renew(self) -> None:
        """A key was revoked, and a PUB socket cannot drop one peer: all have to pass the authenticator again.

        Clients connect again by themselves; what they miss meanwhile, the answers to their heartbeats tell.
        """
        if self._ended or self._socket.closed:
            return
        log.warning("a key was taken out of the allow-list: every listener of notifications has to connect again")
        self._socket.close()
        self._bind_again(time.monotonic())

    def close(self) -> None:
        """Close the socket for good."""
        self._ended = True
        self._socket.close()

    def _open(self) -> Any:
        socket = self._context.socket(zmq.PUB)
        auth.configure(socket, self._limits, self._keys)
        return socket

    def _bind_again(self, since: float) -> None:
        if self._ended:
            return
        self._socket = self._open()
        try:
            self.bind(self._endpoint, "It is tried again")
        except CannotListen as problem:
            self._socket.close()
            if time.monotonic() - since > REBIND_LATE_S:
                log.error("nobody is notified: %s", problem)
                since = time.monotonic()
            self._loop.call_later(REBIND_S, lambda: self._bind_again(since))
