"""Sends and receives multipart messages without waiting. Router, link and asker call it.

The same as pyzmq's `send_multipart` and `recv_multipart`, which look up an enum member or two for each frame: on small
frames that costs more than handing them to ZeroMQ.
"""

from collections.abc import Sequence
from typing import Any

import zmq

_send = zmq.backend.Socket.send  # zmq.Socket's own looks at options for other kinds of sockets first
_NOBLOCK = int(zmq.NOBLOCK)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


def send_parts(socket: zmq.Socket, parts: Sequence[Any], copy: bool = False) -> None:
    """Send all parts, or raise zmq.Again and send none."""
    for part in parts[:-1]:
        _send(socket, part, _MORE, copy)
    _send(socket, parts[-1], _NOBLOCK, copy)


def readable(socket: zmq.Socket) -> bool:
    """Whether a whole message is there; much cheaper than trying to receive none, or than a poll."""
    return bool(socket.getsockopt(_EVENTS) & _POLLIN)


def receive_parts(socket: zmq.Socket, wait: bool = False) -> list[zmq.Frame]:
    """The next message's frames. Raises zmq.Again when there is none; with `wait` after the socket's RCVTIMEO."""
    frame = socket.recv(0 if wait else _NOBLOCK, False)
    parts = [frame]
    while frame.more:
        frame = socket.recv(_NOBLOCK, False)
        parts.append(frame)
    return parts
