"""A memory of names that peers choose: bounded, the least recently used is forgotten, and the first time that is said.

The replay guard keeps the processes of each actor's name in one, the gateway what it tells of each actor.
"""

import logging
from collections import OrderedDict

log = logging.getLogger(__name__)


class Bounded[K, V](OrderedDict[K, V]):
    """limit: entries kept. what: they are, for the log. Setting a key makes it the newest."""

    def __init__(self, limit: int, what: str) -> None:
        super().__init__()
        self._limit, self._what, self._told = limit, what, False

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._limit:
            self.popitem(last=False)
            if not self._told:
                self._told = True
                log.warning("more than %d %s: from now on the oldest are forgotten", self._limit, self._what)
