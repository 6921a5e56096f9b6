"""Which process speaks for each actor's name: one at a time, and a restarted one at once. Asked by the server's hello.

    hello (name, boot, session) ─▶ nobody else there                            ─▶ let in
                                   the rival had our spool, or has hung up      ─▶ let in, the rival is retired
                                   the rival is connected: heard since we asked ─▶ Refused, naming unique_identifier
                                                           not yet              ─▶ NotReady: hello again in a second
                                                           silent for GONE_S    ─▶ let in, the rival is retired

`session` names the actor's spool, which one living process holds at a time (a file lock): a hello from the same spool
proves that the process before it is dead, so kill -9 and a start need no waiting. A retired process that comes back
(its host was cut off) is told so; what it has recorded is still taken on its data link.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from serl_transport.connection.replay_guard import Boots
from serl_transport.contract.errors import NotReady, Refused

GONE_S = 3.0  # a living client sends a heartbeat every second
RETIRED = "retired"  # role of a replaced process that delivers what it has left
_ASKING = 1024  # newcomers remembered while their rival is looked for


class Rival(Protocol):
    """A connection of an actor: `router.Peer`."""

    address: bytes
    boot_id: str
    last_seen: float
    session: str | None
    host: str | None


class Sessions:
    """Owned by the server's loop.

    rivals(name, boot): connections of other processes that speak as `name`. is_connected(address): is that socket still
    there? forget(address): let it say hello again.
    """

    def __init__(
        self,
        rivals: Callable[[str, str], list],
        is_connected: Callable[[bytes], bool],
        forget: Callable[[bytes], None],
    ) -> None:
        self._rivals, self._is_connected, self._forget = rivals, is_connected, forget
        self._boots = Boots()
        # (name, boot, data link?) -> its first hello. Each link by itself: one refusal must not restart the other wait.
        self._asked: OrderedDict[tuple[str, str, bool], float] = OrderedDict()

    def enter(self, name: str, boot: str, session: str | None, *, delivers: bool) -> bool:
        """Let that process in; False when it is retired and may only deliver (`delivers`: its data link).

        Raises Refused when another living process speaks as `name` or has replaced this one, NotReady while the other
        one is being looked for.
        """
        if self._boots.is_retired(name, boot):
            if delivers:
                return False
            raise Refused(
                f"another process of {name!r} has taken over from this one: two actors need two names, give one of "
                "them another unique_identifier="
            )
        rivals = self._rivals(name, boot)
        for rival in rivals:
            same_spool = bool(session) and rival.session == session
            if not same_spool and self._is_connected(rival.address):
                self._look((name, boot, delivers), rival)
        self._asked.pop((name, boot, delivers), None)
        for rival in rivals:
            self._forget(rival.address)
        self._boots.enter(name, boot)
        return True

    def _look(self, newcomer: tuple[str, str, bool], rival: Rival) -> None:
        """Raise unless the rival has been silent for GONE_S since the newcomer's first hello."""
        now, name = time.monotonic(), newcomer[0]
        asked = self._asked.setdefault(newcomer, now)
        while len(self._asked) > _ASKING:
            self._asked.popitem(last=False)
        if rival.last_seen > asked:
            del self._asked[newcomer]
            where = rival.host or "another host"
            raise Refused(
                f"another living process speaks as {name!r} ({where}, heard {now - rival.last_seen:.1f} s ago): two "
                "actors need two names, give this one another unique_identifier="
            )
        if now - asked < GONE_S:
            raise NotReady(f"another process spoke as {name!r}; looking whether it still does, hello again")
