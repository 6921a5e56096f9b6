"""Hears the learner's notifications (5589) in the control link's loop, and comes back after every kind of cut.

    5589 PUB ─▶ SUB ─▶ deliver(body)          watch ─ hopeless ─▶ a new socket

Nothing is sent on this connection, so silence is no sign of a dead one: what its socket's monitor tells is.
"""

import logging
from collections.abc import Callable
from typing import Any

import zmq

from serl_transport.connection.watch import Watch
from serl_transport.contract.errors import WireError
from serl_transport.security import auth
from serl_transport.security.keys import ClientKeys
from serl_transport.wire.codec import Limits, unpack
from serl_transport.wire.loop import EventLoop
from serl_transport.wire.multipart import readable, receive_parts

log = logging.getLogger(__name__)

NOTIFY_TOPIC = b"notify"
LOOK_S = 0.5


class Subscriber:
    """Owns one SUB socket. Made before `loop` runs; everything else happens in its thread."""

    def __init__(
        self,
        loop: EventLoop,
        context: zmq.Context,
        endpoint: str,
        deliver: Callable[[dict[str, Any]], None],
        *,
        limits: Limits,
        keys: ClientKeys | None,
    ):
        """`deliver` gets each notification's body."""
        self._loop, self._context, self._endpoint, self._deliver = loop, context, endpoint, deliver
        self._limits, self._keys = limits, keys
        self._open()
        loop.every(LOOK_S, self._look)

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.SUB)
        auth.configure(self._socket, self._limits, self._keys)
        self._socket.setsockopt(zmq.SUBSCRIBE, NOTIFY_TOPIC)
        self._watch = Watch(self._socket)
        self._socket.connect(self._endpoint)
        self._loop.add_socket(self._socket, self._receive)

    def _look(self) -> None:
        self._watch.look()
        if self._watch.hopeless:
            self._loop.remove_socket(self._socket)
            self._watch.close()
            self._open()

    def _receive(self) -> None:
        while readable(self._socket):
            _, *frames = receive_parts(self._socket)
            try:
                self._deliver(unpack(frames, self._limits))
            except WireError as error:
                log.error("a bad notification from the learner: %s", error.message)
