"""Who may listen where, and the options every socket gets.

Servers and links pass each socket through `configure` before bind or connect: the one place where keys will be set.
"""

import ipaddress
import logging

import zmq

from serl_transport.codec import Limits

log = logging.getLogger(__name__)

HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2000


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, insecure: bool) -> None:
    """ValueError for a bind beyond loopback that nothing protects; with `insecure` it is allowed and warned about."""
    if is_loopback(host):
        return
    if not insecure:
        raise ValueError(
            f"bind_host={host} can be reached from other machines and has no keys: anyone there could feed and stop "
            "the learner. Use bind_host=127.0.0.1 (with an ssh tunnel), or insecure=true on a network you trust"
        )
    log.warning("listening on %s without keys: anyone who reaches this port can feed and stop the learner", host)


def configure(socket: zmq.Socket, limits: Limits) -> None:
    """Bound what may come in, and notice a dead or silently cut link within seconds instead of minutes."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.frame_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 2 * HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 1000)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
