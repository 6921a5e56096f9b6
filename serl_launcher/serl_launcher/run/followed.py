"""The small files of a run that a host beyond the first keeps a copy of, beside the journal: both ends of their way.

    gateway.feed ── Offered.news(what the follower has) ─▶ {name: {at, data}} ─▶ store(root, …) ── follower

They are what people did and said. A file that only grew is sent from where the copy ends; one that is another is sent
anew. Torch-free.
"""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.run.config import dotted
from serl_launcher.run.files import write_whole

# In the order in which they are read. They are stored the other way round: a mark tells of no line that is missing.
NAMES = ("acts.mark", "acts.jsonl", "relabelled.json")
PART_BYTES = 1 << 20  # of a file at once
# What may differ between the hosts of a run: where each finds and keeps its things, and who looks at it. trained_on is
# what a resumed start knows; ranks take it from rank 0.
OWN_KEYS = (
    "actor", "bind_host", "broadcast_port", "code", "console", "follower", "insecure", "ip", "launch.machine_rank",
    "learner", "operator_name", "policy.trained_on", "port", "rollout.groot", "rollout.openpi", "runs_dir",
    "security", "serving", "telemetry", "trainer.device", "trainer.threads",
)  # fmt: skip


def config_keys(config: Mapping[str, Any]) -> dict[str, int]:
    """Dotted key -> digest of its value, of what must be the same on every host: no value leaves its host."""
    return {
        key: zlib.crc32(repr(value).encode())
        for key, value in dotted(dict(config)).items()
        if not any(key == own or key.startswith(f"{own}.") for own in OWN_KEYS)
    }


def states(root: Path) -> dict[str, list[int]]:
    """What a host has: name -> [bytes, crc32]; [0, 0] where there is no such file."""
    return {name: [len(content), zlib.crc32(content)] for name, content in ((n, _read(root / n)) for n in NAMES)}


class Offered:
    """The files of a run folder, as a follower asks for them. One thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[tuple[str, int], tuple[tuple[int, ...], int]] = {}  # (name, bytes) -> stamp, crc32 of these

    def news(self, theirs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """{name: {at, data: uint8[n]}} of the files that differ: the copy is to end at byte `at` and go on with `data`.

        theirs: `states` of the follower.
        """
        return {name: part for name in NAMES if (part := self._part(name, *theirs.get(name, (0, 0)))) is not None}

    def _part(self, name: str, size: int, crc: int) -> dict[str, Any] | None:
        path = self._root / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None  # nothing is taken back: what is not there was never there
        same = self._crc(path, size, (stat.st_size, stat.st_mtime_ns, stat.st_ino)) == crc
        if same and size == stat.st_size:
            return None
        content, at = _read(path), size if same else 0
        rest = content[at:]
        if path.suffix == ".jsonl":
            rest = rest[: min(len(rest), PART_BYTES)]
            rest = rest[: rest.rfind(b"\n") + 1]  # whole lines: the last one may be half written
        return {"at": at, "data": np.frombuffer(rest, np.uint8)} if rest else None

    def _crc(self, path: Path, size: int, stamp: tuple[int, ...]) -> int | None:
        """Of the first bytes; None where there are fewer."""
        if size > stamp[0]:
            return None
        known = self._known.get((path.name, size))
        if known is None or known[0] != stamp:
            if len(self._known) > 16 * len(NAMES):
                self._known.clear()
            known = self._known[path.name, size] = (stamp, zlib.crc32(_read(path)[:size]))
        return known[1]


def store(root: Path, news: Mapping[str, Any]) -> Iterator[str]:
    """Write what came, each file whole; yields the names. OSError: the disk refuses. Names of no such file are left."""
    for name in reversed([name for name in NAMES if name in news]):
        at, data = int(news[name]["at"]), bytes(news[name]["data"])
        kept = _read(root / name)[:at]
        if len(kept) == at:
            write_whole(root / name, lambda part, whole=kept + data: part.write_bytes(whole))
            yield name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
