"""Hears notifications and keeps a client's parameters fresh, on a thread that may take its time.

    5589 SUB ─▶ deliver() ─▶ [queue, newest 1000] ─▶ on_notify callbacks
    notify, hello and heartbeat replies ─▶ saw_version() ─▶ pull ─▶ network callback

A version is pulled, never pushed: a client that missed the notification learns of it from the next heartbeat.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from serl_transport.contract.errors import WireError
from serl_transport.parameters.params import ParametersBlob
from serl_transport.wire.blob import split
from serl_transport.wire.codec import Limits, unpack

log = logging.getLogger(__name__)

NetworkCallback = Callable[[Any], None]
RETRY_S = 1.0


class Listener:
    """Owns the callback thread of one client; started by the first callback."""

    def __init__(self, fetch: Callable[[], ParametersBlob], limits: Limits):
        """`fetch()` pulls the newest version."""
        self._fetch, self._limits = fetch, limits
        self._notify_callbacks: list[Callable[[dict[str, Any]], None]] = []
        self._network_callback: NetworkCallback | None = None
        self._raw = False
        self._bodies: deque[dict[str, Any]] = deque(maxlen=1000)
        self._newest = 0  # version that the server last told of; 0: none
        self._delivered = 0  # version that the callback last got; 0: none
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def on_notify(self, fn: Callable[[dict[str, Any]], None]) -> None:
        """Call `fn(body)` for every notification."""
        self._notify_callbacks.append(fn)
        self._start()

    def on_network(self, fn: NetworkCallback, raw: bool) -> None:
        """Call `fn` with each newest version's parameters; with `raw`, with the `ParametersBlob`."""
        self._network_callback, self._raw = fn, raw
        self._start()

    def deliver(self, body: dict[str, Any]) -> None:
        """A notification came. Thread-safe."""
        self._bodies.append(body)
        if body.get("topic") == "params":
            self._saw(body.get("version"))
        self._wake.set()

    def saw_version(self, reply: dict[str, Any]) -> None:
        """A hello or heartbeat reply told the newest version. Thread-safe."""
        self._saw(reply.get("params_version"))

    def forget(self) -> None:
        """The server restarted: its versions may have started over, so the next one told is pulled. Thread-safe."""
        self._newest = self._delivered = 0

    def stop(self) -> None:
        """End the thread; a running callback is waited for."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _saw(self, version: Any) -> None:
        if isinstance(version, int) and version != self._newest:
            self._newest = version
            self._wake.set()

    def _start(self) -> None:
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trainer-client-callbacks", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while self._bodies and not self._stopping:
                self._run_notify_callbacks(self._bodies.popleft())
            is_told = self._newest not in (0, self._delivered)
            if self._network_callback is not None and is_told and not self._stopping:
                self._refresh(self._network_callback)

    def _run_notify_callbacks(self, body: dict[str, Any]) -> None:
        for fn in self._notify_callbacks:
            try:
                fn(body)
            except Exception:
                log.exception("a notification callback failed")

    def _refresh(self, callback: NetworkCallback) -> None:
        wanted = self._newest
        try:
            published = self._fetch()
            payload = published if self._raw else unpack(split(published.blob), self._limits)["params"]
        except WireError as error:
            if not self._stopping:
                log.warning("parameters version %d could not be pulled: %s", wanted, error.message)
                retry = threading.Timer(RETRY_S, self._wake.set)
                retry.daemon = True
                retry.start()
            return
        if published.version == self._delivered:
            return  # the announcement was older than what was pulled last time
        # Tried counts as delivered: a callback that fails on a version is not given the same one again.
        self._newest = self._delivered = published.version
        try:
            callback(payload)
        except Exception:
            log.exception("the network callback failed on version %d; the next version is tried", published.version)
