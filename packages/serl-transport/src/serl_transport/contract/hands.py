"""What travels while a person drives a robot from a page: one frame after the other, each of what is pressed at that
moment.

    page ─▶ console ─▶ request `drive` ─▶ gateway ─▶ answer to the actor's `hands` ─▶ interventions/browser.py
    page ◀─ console ◀─ its answer      ◀─ gateway ◀─ the actor's next `hands`: its beat

Frames may be lost, doubled and late. Each says what is held now, so the next one mends what a lost one missed; taps are
repeated until the actor has counted them. A frame carries the number of the newest beat that its page has seen: by it
the actor, which knows when it sent that beat, knows the frame's age without anybody's clock but its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serl_transport.contract.bounds import INT64, check_number, check_text, check_whole, shown
from serl_transport.contract.people import check_person

HELD, TAPS, AXES, NAME = 16, 16, 12, 12  # at most so many, and characters of a key's name


@dataclass(frozen=True, slots=True)
class HandFrame:
    """One moment at a page."""

    page: str  # the page that sends, as its console named it
    seq: int  # counts this page's frames, from 1
    echo: int  # the newest beat of the actor that this page has seen; 0: none
    held: frozenset[str]  # keys and buttons that are down: "w", "enter", "RB"
    axes: dict[str, float]  # sticks that are deflected, each in [-1, 1]: "LX"
    taps: tuple[tuple[int, str], ...]  # presses that the actor has not counted yet: number, key or button
    person: str  # at that page

    @staticmethod
    def of(body: Any) -> "HandFrame":
        """From a message's `frame`. ValueError names what cannot be meant."""
        if not isinstance(body, Mapping):
            raise ValueError(f"frame: expected a map, got {shown(body)}")
        held, axes, taps = body.get("held", []), body.get("axes", {}), body.get("taps", [])
        if not isinstance(held, list) or len(held) > HELD:
            raise ValueError(f"frame.held: expected at most {HELD} names, got {shown(held)}")
        if not isinstance(axes, Mapping) or len(axes) > AXES:
            raise ValueError(f"frame.axes: expected at most {AXES} axes by name, got {shown(axes)}")
        if not isinstance(taps, list) or len(taps) > TAPS or not all(isinstance(t, list) and len(t) == 2 for t in taps):
            raise ValueError(f"frame.taps: expected at most {TAPS} pairs of number and name, got {shown(taps)}")
        return HandFrame(
            page=check_text("frame.page", body.get("page"), 64),
            seq=check_whole("frame.seq", body.get("seq"), 1, INT64),
            echo=check_whole("frame.echo", body.get("echo"), 0, INT64),
            held=frozenset(check_text("frame.held", name, NAME) for name in held),
            axes={check_text("frame.axes", k, NAME): float(check_number(f"frame.axes.{k}", v, -1, 1))
                  for k, v in axes.items()},
            taps=tuple((check_whole("frame.taps", n, 1, INT64), check_text("frame.taps", key, NAME))
                       for n, key in taps),
            person=check_person("frame.person", body.get("person")),
        )  # fmt: skip
