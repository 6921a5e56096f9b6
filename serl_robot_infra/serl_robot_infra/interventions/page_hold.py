"""Does a page of the console hold this actor now, and what is pressed there? The dead man's switch of operator=browser.

    beat() ─▶ gateway ─▶ page, which names the newest beat that it has seen in each frame ─▶ take(): how old? ─▶ held

A frame is no older than the beat that it names: when that was sent this process knows, so no clock but its own is asked
and a slow way is found out in either direction. Fed by the device's thread, asked by the control loop.
"""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from serl_transport.contract.hands import HandFrame

BEATS = 128  # whose time is remembered; an older one is too old in any case


class PageHold:
    """limit_s: what is older counts for nothing, and after so long without a frame all is let go."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._lock = threading.Lock()
        self._beat = secrets.randbelow(1 << 31)  # a predecessor's beats mean nothing to this process
        self._sent: OrderedDict[int, float] = OrderedDict()  # beat -> when it was sent
        self._page: str | None = None
        self.person: str | None = None  # at the page that had this actor last
        self._seq = self._tap = 0  # of that page, the newest that counted
        self._stale = 0  # frames that came too late, in all
        self._fresh = -float("inf")  # when the newest frame that counted came
        self._held: frozenset[str] = frozenset()
        self._axes: dict[str, float] = {}
        self._taps: list[str] = []

    def beat(self) -> dict[str, int | bool]:
        """The next question to the gateway: what has come through so far."""
        with self._lock:
            self._beat += 1
            self._sent[self._beat] = self._clock()
            while len(self._sent) > BEATS:
                self._sent.popitem(last=False)
            holds = self._silent_s() <= 0
            return {"beat": self._beat, "seq": self._seq, "tap": self._tap, "stale": self._stale, "holds": holds}

    def take(self, frame: HandFrame) -> None:
        """A frame came; too late it counts for nothing, and a doubled one does not count twice."""
        with self._lock:
            now = self._clock()
            if now - self._sent.get(frame.echo, -float("inf")) > self._limit_s:
                self._stale += 1
                return
            if frame.page != self._page:
                self._page, self._seq, self._tap = frame.page, 0, 0
            if frame.seq <= self._seq:
                return
            self._seq, self._fresh, self._held, self._axes = frame.seq, now, frame.held, frame.axes
            self.person = frame.person
            for number, key in sorted(frame.taps):
                if number > self._tap:
                    self._tap = number
                    self._taps.append(key)

    def let_go(self, page: object) -> None:
        """That page says that it lets go."""
        with self._lock:
            if page == self._page:
                self._fresh = -float("inf")

    @property
    def silent_s(self) -> float:
        """Seconds since all was let go; 0 or less while a page holds this actor, infinite before the first."""
        with self._lock:
            return self._silent_s()

    def pressed(self) -> tuple[frozenset[str], dict[str, float]]:
        """Keys and buttons that are held, and deflected sticks; nothing once all is let go."""
        with self._lock:
            return (self._held, self._axes) if self._silent_s() <= 0 else (frozenset(), {})

    def taps(self) -> list[str]:
        """Keys and buttons that were pressed since the last call, in order."""
        with self._lock:
            taps, self._taps = self._taps, []
            return taps

    def _silent_s(self) -> float:
        return self._clock() - self._fresh - self._limit_s
