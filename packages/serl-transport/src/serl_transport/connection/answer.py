"""A reply on its way over a link: made by `Link.ask`, filled in by the link's thread, waited for by whoever asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serl_transport.contract.errors import ServerSilent, WireError
from serl_transport.wire.codec import Frames, unpack

if TYPE_CHECKING:
    from serl_transport.connection.link import Link


class Answer:
    """A reply on its way."""

    def __init__(self, link: Link, request_id: int, kind: str, on_answer: Callable[[], None] | None, at_once: bool):
        self._link, self._request_id, self._kind = link, request_id, kind
        self._at_once = at_once  # read in the loop's thread
        self._on_answer = on_answer
        self._lock = threading.Lock()  # held until the reply is here
        self._lock.acquire()
        self._result: Frames | WireError | dict[str, Any] = []

    def take(self, result: Frames | WireError) -> None:
        """The reply; in the loop's thread."""
        self._result = self._read(result) if self._at_once else result
        self._lock.release()
        if self._on_answer is not None:
            self._on_answer()

    @property
    def settled(self) -> bool:
        """Whether the reply is here, and was not asked for yet."""
        return not self._lock.locked()

    @property
    def failed(self) -> bool:
        """Whether the reply is an error."""
        return isinstance(self._result, WireError)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._link.loop.call_soon(lambda: self._link.give_up(self._request_id))

    def result(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the reply's body, once. Raises the server's typed error, or ServerSilent after `timeout_s`."""
        link = self._link
        if not self._lock.acquire(timeout=timeout_s):
            self.cancel()
            raise ServerSilent(
                f"no reply to {self._kind!r} from {link.endpoint} in {timeout_s * 1e3:g} ms; {link.state()}"
            )
        result = self._result if isinstance(self._result, dict) else self._read(self._result)
        if isinstance(result, WireError):
            raise result
        return result

    def _read(self, result: Frames | WireError) -> dict[str, Any] | WireError:
        if isinstance(result, WireError):
            return result
        try:
            return unpack(result, self._link.limits) if result else {}
        except WireError as error:
            return error
