"""Where the frames of a person who drives from the console's page meet the actor that waits for them.

    console ─▶ request `drive` ─▶ drive() ─▶ [the newest frame of each actor] ─▶ answer to `hands` ─▶ actor
       ▲ its answer: the actor's newest beat                       poll() ◀─ request `hands`: beat ◀─┘

One page at a time has an actor; another one is told who. Nothing is queued: a newer frame takes the place of one that
was not fetched. What a frame means and whether it is too old is the actor's to say. Owned by the gateway's loop.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from serl_transport.connection.router import Reply
from serl_transport.contract.bounds import INT64, check_text, check_whole, printable, shown
from serl_transport.contract.errors import BadFrame, Refused
from serl_transport.contract.hands import HandFrame
from serl_transport.contract.people import check_person

PARK_S = 0.2  # an actor's question waits so long for a frame
DEAF_S = 2.0  # an actor that has not asked for so long listens to no page
HELD_S = 1.0  # a page that sends nothing for so long has let go
TABLE_LINES, TABLE_TEXT = 40, 120  # of what keys and buttons do
_FLAGS = ("driving", "holds")
_COUNTS = ("beat", "seq", "tap", "stale")


@dataclass(slots=True)
class _Seat:
    """What is known of one actor that listens to pages."""

    polled: float = 0.0  # time.monotonic() of its last question
    parked: bytes | None = None  # return address of the question that waits
    beat: dict[str, Any] = field(default_factory=dict)  # its newest one
    table: list[str] = field(default_factory=list)  # what each key does, in its words
    page: str | None = None  # that drives it
    person: str = ""  # at that page
    by: str = ""  # the same, with the operator's name whose connection it is
    heard: float = 0.0  # time.monotonic() of that page's last frame
    frame: dict[str, Any] | None = None  # the newest one, not fetched yet


class Hands:
    """reply, later: the server's (TrainerServer.reply, EventLoop.call_later); note: keeps an act, and by whom."""

    def __init__(
        self,
        reply: Callable[[bytes, Reply], None],
        later: Callable[[float, Callable[[], object]], None],
        note: Callable[[dict[str, Any], str], None],
    ) -> None:
        self._reply, self._later, self._note = reply, later, note
        self._seats: dict[str, _Seat] = {}

    def poll(self, actor: str, token: bytes, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """An actor's `hands`: its beat. The newest frame, or None: answered when one comes, within PARK_S."""
        seat = self._seats.setdefault(actor, _Seat())
        try:
            seat.beat = {key: check_whole(key, body.get(key), 0, INT64) for key in _COUNTS}
        except ValueError as error:
            raise BadFrame(f"hands: {error}") from None
        seat.beat |= {key: bool(body.get(key)) for key in _FLAGS}
        if (table := body.get("table")) is not None:
            seat.table = _table(table)
        seat.polled = time.monotonic()
        if seat.page is not None and seat.polled - seat.heard > HELD_S:
            self._released(actor, seat, "the page is silent")
        if seat.frame is not None:
            frame, seat.frame = seat.frame, None
            return {"frame": frame}
        seat.parked = token
        self._later(PARK_S, partial(self._expire, seat, token))
        return None

    def drive(self, operator: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A page's frame (None: it lets go); the actor's newest beat. Refused: another drives, or nobody listens."""
        actor, page, person, frame = _drive(body)
        seat, now = self._seats.get(actor), time.monotonic()
        if seat is None or now - seat.polled > DEAF_S:
            raise Refused(f"{actor} listens to no page: start that actor with operator=browser")
        if seat.page not in (None, page) and now - seat.heard < HELD_S:
            raise Refused(f"{seat.person} drives {actor} from another page")
        taken, by = frame is not None and (seat.page, seat.person) != (page, person), f"{person} ({operator})"
        self._hand_on(seat, {"page": page, "gone": True} if frame is None else frame)
        if seat.page is not None and (frame is None or taken):
            self._released(actor, seat)
        if frame is not None:
            seat.page, seat.person, seat.by, seat.heard = page, person, by, now
        if taken:
            self._note({"act": "take_keys", "actor": actor}, by)
        return dict(seat.beat)

    def to_view(self) -> dict[str, dict[str, Any]]:
        """Of each actor that listens to pages: who drives it from one, and what its keys do."""
        now = time.monotonic()
        return {
            actor: {"person": seat.person if seat.page and now - seat.heard < HELD_S else None, "table": seat.table}
            for actor, seat in self._seats.items()
            if now - seat.polled < DEAF_S
        }

    def _released(self, actor: str, seat: _Seat, why: str | None = None) -> None:
        """The page has let go, or is taken to have."""
        seat.page = None
        self._note({"act": "release_keys", "actor": actor, **({"why": why} if why else {})}, seat.by)

    def _hand_on(self, seat: _Seat, frame: dict[str, Any]) -> None:
        if seat.parked is None:
            seat.frame = frame
        else:
            self._answer(seat, {"frame": frame})

    def _expire(self, seat: _Seat, token: bytes) -> None:
        if seat.parked == token:
            self._answer(seat, {"frame": None})

    def _answer(self, seat: _Seat, body: dict[str, Any]) -> None:
        token, seat.parked, seat.frame = seat.parked, None, None
        assert token is not None
        self._reply(token, body)


def _drive(body: Mapping[str, Any]) -> tuple[str, str, str, dict[str, Any] | None]:
    """(actor, page, person, frame); BadFrame names what is wrong."""
    try:
        actor, page = (check_text(f"drive: {key}", body.get(key), 64) for key in ("actor", "page"))
        person = check_person("drive: person", body.get("person"))
        frame = body.get("frame")
        if frame is not None:
            frame = {**frame, "page": page, "person": person} if isinstance(frame, Mapping) else frame
            HandFrame.of(frame)
    except ValueError as error:
        raise BadFrame(str(error)) from None
    return actor, page, person, frame


def _table(table: Any) -> list[str]:
    if not isinstance(table, list) or len(table) > TABLE_LINES or not all(isinstance(line, str) for line in table):
        raise BadFrame(f"hands: table: expected at most {TABLE_LINES} lines of text, got {shown(table)}")
    return [printable(line)[:TABLE_TEXT] for line in table]
