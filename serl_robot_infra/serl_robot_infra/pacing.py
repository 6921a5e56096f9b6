"""The control loop's clock and its stop signal, asked by the actor loop between ticks; its watchers' clock."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Set by SIGINT, SIGTERM or SIGHUP (a closed terminal): the loop ends its episode, flushes and leaves.

    A second signal interrupts at once.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle these signals of this process meanwhile, SIGHUP unless it is ignored (nohup); main thread only."""
        hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Ask for the end from within the process."""
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but no longer than until the stop; True when stopped."""
        return self._event.wait(seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self._event.set()


class Pace:
    """Keeps ticks `1 / rate_hz` seconds apart and counts those that came too late; a rate of 0 does not wait at all."""

    def __init__(self, rate_hz: float):
        self.set_rate(rate_hz)
        self._due = 0.0
        self.overruns = 0

    def set_rate(self, rate_hz: float) -> None:
        """Between two episodes. ValueError: below 0."""
        if rate_hz < 0:
            raise ValueError(f"rate_hz: expected 0 or more, got {rate_hz}")
        self._period = 1.0 / rate_hz if rate_hz else 0.0

    def start(self) -> None:
        """The first tick of an episode is due now."""
        self._due = time.monotonic()

    def wait(self) -> None:
        """Sleep until the next tick is due; a late tick moves the clock instead of being made up for."""
        if not self._period:
            return
        self._due += self._period
        late = time.monotonic() - self._due
        if late > 0:
            self.overruns += 1
            self._due += late
        else:
            time.sleep(-late)


@contextmanager
def repeated(name: str, seconds: float, look: Callable[[], None]) -> Iterator[None]:
    """`look`, every so many seconds, on a thread of that name for as long as this lasts."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            look()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
