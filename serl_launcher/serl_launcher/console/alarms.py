"""What must not be overlooked, from the status document: one line for each thing that is wrong. Used by `feed`."""

from collections.abc import Mapping
from typing import Any

LATE_S = 4.0  # the gateway writes its status every second
ASKED = ("waiting for the operator", "set the scene, then press")  # as an actor says it
SILENT_S = 5.0  # an actor says something every second


def alarms(status: Mapping[str, Any], silent_s: float) -> list[dict[str, Any]]:
    """`[{who, text}]`, the gravest first; silent_s: for how long the gateway has told nothing new.

    `asks: True` with those that are no fault: a robot that waits for its person.
    """
    found = []
    if not status:
        return [{"who": "learner", "text": "has told nothing yet"}]
    if silent_s > LATE_S:
        found.append({"who": "gateway", "text": f"silent for {silent_s:.0f} s: nothing here is news"})
    if storage := status.get("storage"):
        found.append({"who": "disk", "text": str(storage)})
    if waits := (status.get("trainer") or {}).get("waits"):
        found.append({"who": "trainer", "text": str(waits)})
    found += [{"who": name, "text": str(text)} for name, text in (status.get("troubles") or {}).items()]
    for name, actor in sorted((status.get("actors") or {}).items()):
        if text := _of_actor(actor, bool(status.get("done"))):
            asks = {"asks": True} if any(words in text for words in ASKED) else {}
            found.append({"who": name, "text": text, **asks})
    return sorted(found, key=lambda alarm: alarm.get("asks", False))


def _of_actor(actor: Mapping[str, Any], done: bool) -> str | None:
    if actor.get("left"):
        return None if done else f"has left: {actor['left']}"
    if (silent_s := actor.get("last_seen_s") or 0.0) > SILENT_S:
        return f"silent for {silent_s:.0f} s"
    return actor.get("trouble")
