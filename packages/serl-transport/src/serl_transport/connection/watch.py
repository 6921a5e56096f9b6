"""Is a socket that we connected still connected? And when it is to be replaced by a new one.

Subscriber and asker, whose connections may be silent for long, ask. libzmq connects again by itself after most cuts,
but never after a protocol error (one flipped bit in a length); its monitor then tells of a disconnection, and no more.
"""

import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from serl_transport.wire.multipart import readable

REOPEN_S = 5.0  # as long as a link waits; libzmq has tried again several times by then, if it ever will


class Watch:
    """Watches one socket with one connection; made before its `connect`."""

    def __init__(self, socket: zmq.Socket):
        # A protocol error after the handshake is told as a plain disconnection.
        self.monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket = socket
        self._down_since: float | None = time.monotonic()  # None: connected

    def look(self) -> bool:
        """Take what the monitor has told; True when the connection was cut since the last look."""
        cut = False
        while readable(self.monitor):
            event = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))["event"]
            self._down_since = None if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else time.monotonic()
            cut = cut or event == zmq.EVENT_DISCONNECTED
        return cut

    @property
    def hopeless(self) -> bool:
        """Whether the last `look` was on a connection that has been down for too long."""
        return self._down_since is not None and time.monotonic() - self._down_since > REOPEN_S

    def close(self) -> None:
        """Close the socket and its monitor."""
        self._socket.disable_monitor()
        self.monitor.close()
        self._socket.close()
