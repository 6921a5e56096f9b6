"""When a finished run may end: not before its actors have made their last episodes. Asked by the supervisor.

    status.json: done, ending ─▶ are_over() ─▶ what is waited for, and who is not any longer, on the learner's screen

Who is waited for, and for how long, is the gateway's business (gateway/ending.py).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any


class LastEpisodes:
    """event: shows one thing that happened."""

    def __init__(self, event: Callable[[str], None]) -> None:
        self._event = event
        self._told: set[str] = set()

    def are_over(self, status: Mapping[str, Any]) -> bool:
        """Is nothing left to do, and nobody waited for? Each thing is said once."""
        if not status.get("done"):
            self._told.clear()
            return False
        ending = status.get("ending") or {}
        for name, why in (ending.get("given_up") or {}).items():
            self._say(f"actor {name} is not waited for any longer: {why}; what it holds stays in its spool")
        for name, what in (ending.get("waits_for") or {}).items():
            self._say(f"every stage is done; waiting for actor {name}: it {what} (Ctrl-C: do not wait)")
        if not ending.get("waits_for"):
            self._say("every stage is done")
            return True
        return False

    def waits_for(self, status: Mapping[str, Any]) -> str:
        """The actors that are still waited for, for people; "" when there are none."""
        return ", ".join((status.get("ending") or {}).get("waits_for") or {})

    def _say(self, text: str) -> None:
        kind = re.sub(r"[\d.]+ s", "#", text)
        if kind not in self._told:
            self._told.add(kind)
            self._event(text)
