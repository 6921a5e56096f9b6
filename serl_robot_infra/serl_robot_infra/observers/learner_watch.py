"""Says at the actor's console how the learner is: silent, back, or which of its roles hangs or is started again.

    link (heartbeats, once a second) ─▶ LearnerWatch, a thread ─▶ message()

Started by the actor's main. A thread, because the loop may be held up by the very thing that it tells of, and because a
person who demonstrates asks the learner nothing.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from serl_robot_infra.pacing import repeated

SILENT_S = 4.0  # a learner that is there answers a heartbeat every second
LOOK_S = 1.0
AGAIN_S = 60.0  # what lasts is repeated


class Heard(Protocol):
    """What of a link is watched: serl_transport.client.TrainerClient."""

    @property
    def silent_s(self) -> float:
        """Seconds since the learner was last heard."""
        ...

    @property
    def troubles(self) -> dict[str, str]:
        """What ails the learner's roles, by name, as it last said."""
        ...


class LearnerWatch:
    """say: shows a line."""

    def __init__(self, link: Heard, say: Callable[[str], None]) -> None:
        self._link, self._say = link, say
        self._silent_since: float | None = None  # monotonic
        self._since = ""  # the same for people
        self._told: dict[str, tuple[str, float]] = {}  # name -> what was said of it without its numbers, and when

    def look(self) -> None:
        """Once a second."""
        now, silent_s = time.monotonic(), self._link.silent_s
        if silent_s > SILENT_S:
            if self._silent_since is None:
                self._silent_since = now - silent_s
                self._since = time.strftime("%H:%M:%S", time.localtime(time.time() - silent_s))
            self._say(f"learner silent for {silent_s:.0f} s, since {self._since}; what is recorded stays in the spool")
            return
        if self._silent_since is not None:
            self._say(f"the learner answers again, after {now - silent_s - self._silent_since:.0f} s")
            self._silent_since = None
        self._tell_troubles(self._link.troubles)

    def _tell_troubles(self, troubles: dict[str, str]) -> None:
        now = time.monotonic()
        for name, text in troubles.items():
            kind, (told, at) = re.sub(r"[\d.]+", "#", text), self._told.get(name, ("", 0.0))
            if kind != told or now - at > AGAIN_S:
                self._told[name] = kind, now
                self._say(f"learner: {name} {text}")
        for name in self._told.keys() - troubles.keys():
            del self._told[name]
            self._say(f"learner: {name} is well again")


@contextlib.contextmanager
def watching(link: Heard, say: Callable[[str], None]) -> Iterator[None]:
    """A LearnerWatch on a thread of its own for as long as this lasts."""
    with repeated("learner-watch", LOOK_S, LearnerWatch(link, say).look):
        yield
