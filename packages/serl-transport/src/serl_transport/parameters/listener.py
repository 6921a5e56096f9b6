"""Hears notifications and keeps a client's parameters fresh, on a thread that may take its time.

    5589 SUB ─▶ deliver() ─▶ [queue, newest 1000] ─▶ on_notify callbacks
    notify, hello and heartbeat replies ─▶ saw_version() ─▶ pull ─▶ network callback ─▶ ask ahead for the next version

A version is pulled, never pushed: a client that missed the notification learns of it from the next heartbeat.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from serl_transport.ahead import Ahead
from serl_transport.connection.link import Link
from serl_transport.contract.errors import WireError
from serl_transport.parameters.params import REPLY_S, Pieces, Published, Reply
from serl_transport.wire.codec import Limits, unpack

log = logging.getLogger(__name__)

NetworkCallback = Callable[[Any], None]


class Listener:
    """Owns the callback thread of one client; started by the first callback."""

    def __init__(self, fetch: Callable[..., Published | Pieces], limits: Limits):
        """`fetch(raw, ahead)` pulls the newest version: whole (`raw`) or in pieces, from the answers `ahead` if any."""
        self._fetch, self._limits = fetch, limits
        self._ahead: Ahead | None = None
        self._notify_callbacks: list[Callable[[dict[str, Any]], None]] = []
        self._network_callback: NetworkCallback | None = None
        self._raw = False
        self._bodies: deque[dict[str, Any]] = deque(maxlen=1000)
        self._newest = 0  # version that the server last told of; 0: none
        self._announcement: dict[str, Any] = {}  # the last one heard
        self._delivered = 0  # version that the callback last got; 0: none
        self._wake = threading.Event()
        self._stopping = False
        self._patience_ends: float | None = None  # time.monotonic(); None: no answer is overdue
        self._thread: threading.Thread | None = None

    def ask_ahead_over(self, link: Link) -> None:
        """Ask for the next version before it is announced, on that link; before anything else."""
        self._ahead = Ahead(link, self._wake.set)

    def on_notify(self, fn: Callable[[dict[str, Any]], None]) -> None:
        """Call `fn(body)` for every notification."""
        self._notify_callbacks.append(fn)
        self._start()

    def on_network(self, fn: NetworkCallback, raw: bool) -> None:
        """Call `fn` with each newest version's parameters; with `raw`, with the `Published` blob."""
        self._network_callback, self._raw = fn, raw
        self._start()

    def deliver(self, body: dict[str, Any]) -> None:
        """A notification came. Thread-safe."""
        self._bodies.append(body)
        if body.get("topic") == "params":
            self._announcement = body
            self.saw_version(body)
        self._wake.set()

    def saw_version(self, reply: dict[str, Any]) -> None:
        """A notification, a hello reply or a heartbeat reply told the newest version. Thread-safe."""
        version = reply.get("version" if reply.get("topic") == "params" else "params_version")
        if isinstance(version, int) and version != self._newest:
            self._newest = version
            self._wake.set()

    def announced(self, version: int | None) -> dict[str, Any] | None:
        """What the newest version's announcement said of it (where its file lies); None when it was missed."""
        told = self._announcement
        newest = told.get("version") == self._newest and version in (None, self._newest)
        return told if newest and "file" in told else None

    def forget(self) -> None:
        """The server restarted: its versions may have started over, so the next one told is pulled. Thread-safe."""
        self._newest = self._delivered = 0
        self._announcement = {}
        if self._ahead is not None:
            self._ahead.drop()

    def stop(self) -> None:
        """End the thread; a running callback is waited for."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _start(self) -> None:
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trainer-client-callbacks", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(None if self._patience_ends is None else max(0.0, self._patience_ends - time.monotonic()))
            self._wake.clear()
            while self._bodies and not self._stopping:
                self._run_notify_callbacks(self._bodies.popleft())
            if self._network_callback is not None and not self._stopping and self._is_due():
                ahead = () if self._ahead is None else self._ahead.take()
                if ahead or self._is_told:
                    self._refresh(self._network_callback, ahead)

    @property
    def _is_told(self) -> bool:
        """Whether there is a version that the callback has not got."""
        return self._newest not in (0, self._delivered)

    def _is_due(self) -> bool:
        """Whether to pull: the questions asked ahead are answered, or a version was told of and none were asked.

        If some were, their answers are on their way: asking again would send everything twice.
        """
        patience_ends, self._patience_ends = self._patience_ends, None
        if self._ahead is not None and self._ahead.answered:
            return True
        if not self._is_told:
            return False
        if self._ahead is None or not self._ahead.asked:
            return True
        now = time.monotonic()
        self._patience_ends = patience_ends or now + REPLY_S
        return now >= self._patience_ends

    def _run_notify_callbacks(self, body: dict[str, Any]) -> None:
        for fn in self._notify_callbacks:
            try:
                fn(body)
            except Exception:
                log.exception("a notification callback failed")

    def _refresh(self, callback: NetworkCallback, ahead: Sequence[Reply]) -> None:
        wanted = self._newest
        try:
            published = self._fetch(self._raw, ahead)
            payload = unpack(published.frames, self._limits)["params"] if isinstance(published, Pieces) else published
        except WireError as error:
            if not self._stopping:
                log.warning("parameters version %d could not be pulled: %s", wanted, error.message)
                threading.Timer(1.0, self._wake.set).start()
            return
        if published.version == self._delivered:
            return  # the announcement was older than what was pulled last time
        # Tried counts as delivered: a callback that fails on a version is not given the same one again.
        self._newest = self._delivered = published.version
        try:
            callback(payload)
        except Exception:
            log.exception("the network callback failed on version %d; the next version is tried", published.version)
        if self._ahead is not None and published.chunks:
            self._ahead.renew(published.version, published.chunks)
