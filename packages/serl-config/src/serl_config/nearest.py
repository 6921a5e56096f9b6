"""The tail of a message about an unknown name: what was probably meant. Called wherever names come from a person."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], show: int = 12) -> str:
    """The closest of `known`, by the whole name or by its last part; else all of them, where they are at most `show`.

    >>> nearest("rollout.mod", ["rollout.mode", "port"])
    "; did you mean 'rollout.mode'?"
    >>> nearest("zzz", ["mode", "port"])
    '; there are mode, port'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    leaf = name.rpartition(".")[2]
    leaves: dict[str, list[str]] = {}
    for key in known:
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    for match in difflib.get_close_matches(leaf, list(leaves), n=2, cutoff=0.75):
        close += [key for key in leaves[match] if key not in close]
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close[:3])}?"
    return f"; there are {', '.join(known)}" if len(known) <= show else ""
