"""Refuses messages that were seen before: a sliding window over a connection's request ids, and retired boots.

Data needs neither (its seq is deduplicated for good); these guard requests, which act when they are handled. The
router asks per message, the server per hello.
"""

from collections import OrderedDict

from serl_transport.connection.bounded import Bounded

WINDOW = 1024
_KNOWN_BOOTS = 64  # per actor
_KNOWN_ACTORS = 4096


class ReplayWindow:
    """The newest id and which of the WINDOW ids below it were seen (as in IPsec, RFC 4303 section 3.4.3)."""

    __slots__ = ("_newest", "_seen")

    def __init__(self) -> None:
        self._newest = 0
        self._seen = 0  # bit i: newest - i was seen

    def accept(self, request_id: int) -> bool:
        """Remember an id; False when it was seen before or is too old to tell."""
        ahead = request_id - self._newest
        if ahead > 0:
            self._seen = (self._seen << ahead | 1) & ((1 << WINDOW) - 1) if ahead < WINDOW else 1
            self._newest = request_id
            return True
        if -ahead >= WINDOW or self._seen >> -ahead & 1:
            return False
        self._seen |= 1 << -ahead
        return True


class Boots:
    """Which process of each actor is the current one; a process that another has replaced is retired for good."""

    def __init__(self) -> None:
        self._current: Bounded[str, str] = Bounded(_KNOWN_ACTORS, "actor names")
        self._retired: Bounded[str, OrderedDict[str, None]] = Bounded(_KNOWN_ACTORS, "actor names with a past")

    def is_retired(self, actor_id: str, boot_id: str) -> bool:
        """Was that process replaced?"""
        return boot_id in self._retired.get(actor_id, ())

    def enter(self, actor_id: str, boot_id: str) -> bool:
        """A hello of that process; False when it was replaced earlier."""
        retired = self._retired[actor_id] = self._retired.get(actor_id) or OrderedDict()
        if boot_id in retired:
            return False
        before = self._current.get(actor_id, boot_id)
        if before != boot_id:
            retired[before] = None
            while len(retired) > _KNOWN_BOOTS:
                retired.popitem(last=False)
        self._current[actor_id] = boot_id
        return True
