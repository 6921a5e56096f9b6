"""Hears the learner's notifications (5589) in the control link's loop, and comes back after every kind of cut.

    5589 PUB ─▶ SUB ─▶ deliver(body)          down for REOPEN_S ─▶ a new socket

Nothing is sent on this connection, so silence is no sign of a dead one: what its socket's monitor tells is. libzmq
connects again by itself after most cuts, but never after a protocol error (one flipped bit in a length).
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from serl_transport.contract.errors import WireError
from serl_transport.security import auth
from serl_transport.security.keys import ClientKeys
from serl_transport.wire.codec import Limits, unpack
from serl_transport.wire.loop import EventLoop

log = logging.getLogger(__name__)

NOTIFY_TOPIC = b"notify"
LOOK_S = 0.5
REOPEN_S = 5.0  # as long as a link waits; libzmq has tried again several times by then, if it ever will


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
        loop.every(LOOK_S, self._reopen_when_down)

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.SUB)
        auth.configure(self._socket, self._limits, self._keys, self._endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, NOTIFY_TOPIC)
        # A protocol error after the handshake is told as a plain disconnection.
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._down_since: float | None = time.monotonic()  # None: connected
        self._socket.connect(self._endpoint)
        self._loop.add_socket(self._socket, self._receive)
        self._loop.add_socket(self._monitor, self._notice)

    def _notice(self) -> None:
        event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
        self._down_since = None if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else time.monotonic()

    def _reopen_when_down(self) -> None:
        if self._down_since is None or time.monotonic() - self._down_since <= REOPEN_S:
            return
        for socket in (self._socket, self._monitor):
            self._loop.remove_socket(socket)
        self._socket.disable_monitor()
        self._socket.close()
        self._open()

    def _receive(self) -> None:
        while True:
            try:
                _, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._deliver(unpack(frames, self._limits))
            except WireError as error:
                log.error("a bad notification from the learner: %s", error.message)
