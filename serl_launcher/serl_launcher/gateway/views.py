"""What people at the console see of the actors: the last picture of each camera and what goes on, in memory.

    actor, while it is watched ─▶ request `live` ─▶ take() ─▶ [the last one of each actor] ─▶ give() ─▶ console role
    console asks ─▶ watched ─▶ every heartbeat's reply

Nothing of it is kept on disk, nothing is acknowledged, and nothing is sent while nobody looks. Owned by the gateway.
"""

import time
from collections.abc import Mapping
from typing import Any

from serl_transport.connection.router import Peer
from serl_transport.contract.bounds import check_name, printable, shown
from serl_transport.contract.errors import SchemaMismatch
from serl_transport.wire.envelope import Envelope

WATCHED_S = 3.0  # after the console last asked
KEPT_S = 60.0  # of an actor that sends nothing any more
ACTORS, PICTURES = 16, 8  # that are kept, and of one actor
PICTURE_BYTES = 64 << 10
TEXT = 300  # characters
_WORDS = ("episode", "stage", "mode", "driver", "person", "says")
_NUMBERS = ("tick", "return", "hz", "infer_ms", "overruns", "refused", "backlog")


class Views:
    """The newest `live` of each actor."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[float, int, dict[str, Any]]] = {}  # actor -> monotonic time, count, what it sent
        self._asked = -WATCHED_S
        self._count = 0

    @property
    def watched(self) -> bool:
        """Does somebody look?"""
        return time.monotonic() - self._asked < WATCHED_S

    def take(self, actor: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """An actor's `live`; the reply. SchemaMismatch names what nobody could show."""
        pictures = body.get("pictures", {})
        if not isinstance(pictures, Mapping) or len(pictures) > PICTURES:
            raise SchemaMismatch(f"live: pictures: expected at most {PICTURES} by camera, got {shown(pictures)}")
        for camera, jpeg in pictures.items():
            if not isinstance(jpeg, bytes) or not jpeg.startswith(b"\xff\xd8") or len(jpeg) > PICTURE_BYTES:
                raise SchemaMismatch(
                    f"live: pictures.{shown(camera)}: expected a JPEG of {PICTURE_BYTES} bytes at most"
                )
        try:
            seen = {check_name("live: camera", camera): jpeg for camera, jpeg in pictures.items()}
        except ValueError as error:
            raise SchemaMismatch(str(error)) from None
        self._forget_old()
        self._newest.pop(actor, None)
        if len(self._newest) >= ACTORS:
            self._newest.pop(next(iter(self._newest)))  # whoever sent longest ago
        self._count += 1
        self._newest[actor] = (time.monotonic(), self._count, {"pictures": seen, **_words(body), **_numbers(body)})
        return {"watched": self.watched}

    def give(self, peer: Peer, envelope: Envelope, body: Mapping[str, Any]) -> dict[str, Any]:
        """The console asks: `{actor: {number, age_s, pictures, …}}`, those above `since`, and how old all are."""
        self._asked = time.monotonic()
        self._forget_old()
        since = body.get("since", 0)
        return {
            "actors": {
                actor: {"number": number, "age_s": round(self._asked - at, 2), **(live if number > since else {})}
                for actor, (at, number, live) in self._newest.items()
            }
        }

    def _forget_old(self) -> None:
        oldest = time.monotonic() - KEPT_S
        self._newest = {actor: entry for actor, entry in self._newest.items() if entry[0] > oldest}


def _words(body: Mapping[str, Any]) -> dict[str, str | None]:
    said = {key: body.get(key) for key in _WORDS}
    for key, text in said.items():
        if text is not None and not isinstance(text, str):
            raise SchemaMismatch(f"live: {key}: expected a text or null, got {shown(text)}")
    return {key: None if text is None else printable(text)[:TEXT] for key, text in said.items()}


def _numbers(body: Mapping[str, Any]) -> dict[str, float | None]:
    told = {key: body.get(key) for key in _NUMBERS}
    for key, number in told.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise SchemaMismatch(f"live: {key}: expected a number or null, got {shown(number)}")
    return told
