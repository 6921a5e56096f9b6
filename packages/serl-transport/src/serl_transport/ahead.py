"""Questions for the next version of the parameters, asked before there is one: publishing it answers them.

    client: Ahead.renew ─▶ params {after, number} ─▶ server: Standing.keep … publish … Standing.answer ─▶ client: take

That spares a version the way of its announcement and of the questions for it. Only a client asks ahead that has pulled
its last version over the wire, for as many chunks as that had; whatever goes wrong, the announcement is still there.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from serl_transport.connection.answer import Answer
from serl_transport.connection.link import Link
from serl_transport.contract.errors import NotReady, WireError
from serl_transport.parameters.params import WINDOW

MOST_KEPT = 4096  # questions that a server keeps, of all clients together


class Ahead:
    """The client's side. `drop` may be called from any thread, the rest from the listener's."""

    def __init__(self, link: Link, wake: Callable[[], None]):
        """`wake` is called, in the link's thread, when the questions are answered."""
        self._link, self._wake = link, wake
        self._answers: deque[Answer] = deque()
        self._decisive = 0  # which of the answers is waited for

    def renew(self, version: int, chunks: int) -> None:
        """Ask for the first `chunks` chunks of whatever follows `version`."""
        self.drop()
        # Answers keep their order. Of a version that will need more questions the first is as good as the last.
        self._decisive = chunks - 1 if chunks <= WINDOW else 0
        self._answers = deque(
            self._link.ask(
                "request",
                {"after": version, "number": number},
                target="params",
                on_answer=self._wake if number == self._decisive else None,
                read_at_once=number != self._decisive,
            )
            for number in range(min(chunks, WINDOW))
        )

    @property
    def asked(self) -> bool:
        """Whether there are questions, answered or not."""
        return bool(self._answers)

    @property
    def answered(self) -> bool:
        """Whether it is time to take the answers."""
        answers = self._answers
        return bool(answers) and answers[self._decisive].settled

    def take(self) -> deque[Answer]:
        """The answers, for `pull`; none when the server refused to keep one of the questions."""
        answers, self._answers = self._answers, deque()
        return deque() if any(answer.failed for answer in answers) else answers

    def drop(self) -> None:
        """Wait for no answer any more."""
        answers, self._answers = self._answers, deque()
        for answer in answers:
            answer.cancel()


class Standing:
    """The server's side: questions that wait for a version. Belongs to the loop's thread."""

    def __init__(self, reply: Callable[[bytes, Any], None]):
        """`reply(token, result)` answers."""
        self._reply = reply
        self._kept: OrderedDict[bytes, dict[str, Any]] = OrderedDict()  # by token

    def keep(self, token: bytes, payload: dict[str, Any], newest: int | None) -> bool:
        """Whether the question asks for what follows the newest version, and so waits."""
        if newest is None or payload.get("after") != newest:
            return False
        self._kept[token] = {"version": None, "number": payload.get("number", 0)}
        if len(self._kept) > MOST_KEPT:
            self._reply(self._kept.popitem(last=False)[0], NotReady("too many wait for parameters; ask again"))
        return True

    def answer(self, read: Callable[[dict[str, Any]], Any]) -> None:
        """There is a new version: `read(payload)` gives each question's reply, or raises its WireError."""
        kept, self._kept = self._kept, OrderedDict()
        for token, payload in kept.items():
            try:
                result = read(payload)
            except WireError as error:
                result = error
            self._reply(token, result)
