"""Who may listen where, and the options every socket gets.

Servers and links pass each socket through `configure` before bind or connect: limits, heartbeats, and CURVE when there
are keys.
"""

import ipaddress
import logging
import resource

import zmq

from serl_transport.security.keys import ClientKeys, ServerKeys
from serl_transport.security.zap import DOMAIN
from serl_transport.wire.codec import SHARED_BYTES, Limits

log = logging.getLogger(__name__)

HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2000
HANDSHAKE_MS = 5000  # a connection that has not finished its handshake by then is closed
BACKLOG = 1024  # connections the kernel keeps while the I/O thread is busy
FILES_WANTED = 65_536  # open files a server asks for: one per connection, half-open ones included
FILES_NEEDED = 2048


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, insecure: bool, has_keys: bool = False) -> None:
    """ValueError for a bind beyond loopback that nothing protects; with `insecure` it is allowed and warned about."""
    if is_loopback(host) or has_keys:
        return
    if not insecure:
        raise ValueError(
            f"bind_host={host} can be reached from other machines and has no keys: anyone there could feed and stop "
            "the learner. Make keys (tools/keygen.py) and give security.keys_dir, or use bind_host=127.0.0.1 (with an "
            "ssh tunnel), or insecure=true on a network you trust"
        )
    log.warning("listening on %s without keys: anyone who reaches this port can feed and stop the learner", host)


def configure(
    socket: zmq.Socket, limits: Limits, keys: ServerKeys | ClientKeys | None = None, endpoint: str = ""
) -> None:
    """Bound what may come in, notice a dead or silently cut link within seconds, and encrypt when there are keys.

    endpoint: where it will connect to. IPv6 is switched on for an address of it alone: of a name like localhost
    libzmq would take the IPv6 address, where a learner seldom listens.
    """
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.frame_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 2 * HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    socket.copy_threshold = SHARED_BYTES
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 1000)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if keys is None:
        return
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret)
    if isinstance(keys, ClientKeys):
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    else:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        # Without a handler libzmq would let everybody in; with this it lets nobody in.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def raise_file_limit() -> int:
    """Ask for as many open files as allowed, so that half-open connections cannot use them all up; the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != resource.RLIM_INFINITY and soft < FILES_NEEDED:
        log.warning(
            "this process may open %d files only: %d idle connections would lock actors out; raise `ulimit -n`",
            soft,
            soft,
        )
    return soft
