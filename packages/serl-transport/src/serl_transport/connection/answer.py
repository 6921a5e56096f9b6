"""A reply on its way: made by `Link.ask`, filled in by the link's thread, waited for by whoever asked."""

import threading
from collections.abc import Callable
from typing import Any

from serl_transport.contract.errors import ServerSilent, WireError
from serl_transport.wire.codec import Frames, Limits, unpack


class Answer:
    """kind: of the question; give_up: tells the link that nobody waits any more; state: of the link, for people."""

    def __init__(
        self, kind: str, limits: Limits, give_up: Callable[[], object], endpoint: str, state: Callable[[], str]
    ):
        self._kind, self._limits, self._give_up, self._endpoint, self._state = kind, limits, give_up, endpoint, state
        self._arrived = threading.Event()
        self._reply: Frames | WireError = []

    def take(self, reply: Frames | WireError) -> None:
        """The reply is here; in the link's thread."""
        self._reply = reply
        self._arrived.set()

    def result(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the reply's body. Raises the server's typed error, or ServerSilent after `timeout_s`."""
        if not self._arrived.wait(timeout_s):
            self._give_up()
            raise ServerSilent(
                f"no reply to {self._kind!r} from {self._endpoint} in {timeout_s * 1e3:g} ms; {self._state()}"
            )
        if isinstance(self._reply, WireError):
            raise self._reply
        return unpack(self._reply, self._limits) if self._reply else {}
