"""Why a host cannot be reached, in words and within seconds, so that nobody waits for it without a word.

Asked by whoever is about to wait: the client for its learner, the actor for a reward server, an openpi server and a
rerun viewer, the policies for the model hub. Names are resolved beside the caller, since a dead name server takes as
long as it likes.
"""

import contextlib
import ipaddress
import os
import queue
import socket
import threading
import time

RESOLVE_S, CONNECT_S = 2.0, 2.0
AGAIN_S = 5.0


def is_ipv6(host: str) -> bool:
    """Is it an IPv6 address, with or without brackets and zone?"""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).version == 6
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """As an endpoint or a URI takes it: an IPv6 address in brackets, anything else as it is."""
    return f"[{host.strip('[]')}]" if is_ipv6(host) else host


def resolved(host: str, port: int, timeout_s: float = RESOLVE_S) -> list[tuple]:
    """`socket.getaddrinfo`'s entries of a stream. OSError in words when the name does not resolve in time."""
    found: queue.SimpleQueue[list[tuple] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.put(OSError(f"the name {host!r} does not resolve ({getattr(error, 'strerror', None) or error})"))

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = found.get(timeout=timeout_s)
    except queue.Empty:
        raise OSError(f"the name {host!r} was not resolved within {timeout_s:g} s: is the name server there?") from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def obstacle(host: str, port: int, *, ipv4_names: bool = False) -> str | None:
    """Why no TCP connection can be had, in words; None when it can. ipv4_names: a name needs an IPv4 address."""
    try:
        entries = resolved(host, port)
    except OSError as error:
        return str(error)
    if ipv4_names and not is_ipv6(host):
        theirs = [entry for entry in entries if entry[0] == socket.AF_INET]
        if not theirs:
            return f"the name {host!r} has IPv6 addresses alone: give one of them, such as {entries[0][4][0]}"
        entries = theirs
    family, kind, proto, _, address = entries[0]
    with contextlib.closing(socket.socket(family, kind, proto)) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(address)
        except TimeoutError:
            return f"{address[0]} does not answer: is that machine on, does a firewall between let port {port} pass?"
        except ConnectionRefusedError:
            return f"nothing listens on port {port} of {address[0]}, or on its loopback alone"
        except OSError as error:
            return f"{address[0]}: {os.strerror(error.errno or 0).lower()}"
    return None


class Watch:
    """Asks again every few seconds, on a thread of its own, while somebody reads `words`."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._told: str | None = None
        self._next, self._busy = 0.0, threading.Lock()
        self._look()

    @property
    def words(self) -> str:
        """`: <why>` as it was found last; empty when it can be reached, or nothing is known yet."""
        if time.monotonic() >= self._next:
            self._look()
        return f": {self._told}" if self._told else ""

    def _look(self) -> None:
        if self._busy.acquire(blocking=False):
            threading.Thread(target=self._ask, name="reach", daemon=True).start()

    def _ask(self) -> None:
        try:
            self._told = obstacle(self._host, self._port, ipv4_names=True)
        finally:
            self._next = time.monotonic() + AGAIN_S
            self._busy.release()
