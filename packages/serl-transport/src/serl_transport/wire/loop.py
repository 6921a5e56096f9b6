"""A single-threaded event loop over ZeroMQ sockets: the thread that owns a server's or a client's sockets.

    sockets ─▶ poll ─▶ fn()          other threads ─▶ call_soon(fn) ─▶ [queue, unbounded; a pipe wakes the poll]
    timers  ─▶ due  ─▶ fn()

Everything passed in runs in the loop's thread. A function that raises is logged with its traceback; the loop lives on.
"""

import contextlib
import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from socket import socketpair
from typing import Any

import zmq

log = logging.getLogger(__name__)


class EventLoop:
    """Polls sockets, timers and calls from other threads; `run` returns after `stop`."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._handlers: dict[Any, Callable[[], None]] = {}
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._stopping = threading.Event()
        self.thread_id: int | None = None  # of the thread in `run`
        self._sleeps = True  # in poll, or about to be
        self._wake_read, self._wake_write = socketpair()
        self._wake_fd = self._wake_read.fileno()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._poller.register(self._wake_fd, zmq.POLLIN)

    def add_socket(self, socket: zmq.Socket | int, fn: Callable[[], None]) -> None:
        """Call `fn` whenever `socket` (or a file descriptor) is readable; before `run`, or in the loop's thread."""
        self._handlers[socket] = fn
        self._poller.register(socket, zmq.POLLIN)

    def remove_socket(self, socket: zmq.Socket | int) -> None:
        """Stop watching `socket`; in the loop's thread."""
        del self._handlers[socket]
        self._poller.unregister(socket)

    def call_soon(self, fn: Callable[[], object]) -> None:
        """Run `fn` in the loop's thread, soon. Thread-safe; calls keep their order."""
        self._calls.append(fn)
        if not self._sleeps:
            return  # it looks at the calls before it sleeps
        self._sleeps = False
        # a full pipe wakes the loop as well; a closed one belongs to a loop that has ended
        with contextlib.suppress(OSError):
            self._wake_write.send(b"w")

    def call_later(self, delay_s: float, fn: Callable[[], object]) -> None:
        """Run `fn` once after `delay_s`; in the loop's thread or before `run`."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), fn))

    def every(self, interval_s: float, fn: Callable[[], object]) -> None:
        """Run `fn` every `interval_s`, first after one interval; in the loop's thread or before `run`."""

        def again() -> None:
            self.call_later(interval_s, again)
            fn()

        self.call_later(interval_s, again)

    @property
    def in_loop(self) -> bool:
        """Whether the caller is the loop's thread."""
        return threading.get_ident() == self.thread_id

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Make `run` return. Thread-safe, also from a signal handler."""
        self._stopping.set()
        self.call_soon(lambda: None)

    def run(self) -> None:
        """Serve until `stop`."""
        self.thread_id = threading.get_ident()
        while not self._stopping.is_set():
            self._sleeps = True  # before a look at the calls: whoever adds one later wakes the poll
            ready = dict(self._poller.poll(self._timeout_ms()))
            self._sleeps = False
            if self._wake_fd in ready:
                self._drain_wake()
            for _ in range(len(self._calls)):
                _guard(self._calls.popleft())
            self._run_timers()
            for socket in ready:
                fn = self._handlers.get(socket)  # None: the wake pipe, or removed by a handler before it
                if fn is not None:
                    _guard(fn)

    def finish(self) -> None:
        """Run the calls that came too late for `run`, after it has returned and in its thread."""
        while self._calls:
            _guard(self._calls.popleft())

    def close(self) -> None:
        """Release the wake pipe, after `run` has returned."""
        self._wake_read.close()
        self._wake_write.close()

    def _timeout_ms(self) -> int:
        if self._calls:
            return 0
        if not self._timers:
            return 1000
        return min(1000, max(0, math.ceil((self._timers[0][0] - time.monotonic()) * 1e3)))

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _guard(heapq.heappop(self._timers)[2])


def _guard(fn: Callable[[], object]) -> None:
    try:
        fn()
    except Exception:
        log.exception("a callback of the event loop failed; the loop goes on")
