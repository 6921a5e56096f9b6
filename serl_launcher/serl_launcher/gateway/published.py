"""Published parameters as the gateway sees them: which version is newest, and its bytes in chunks for who pulls.

The trainer writes params/ (serl_launcher.learner.parameters); the gateway only reads. A file that is being pulled is
kept open, so that the trainer may prune it meanwhile.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.gateway.files import read_json
from serl_transport.errors import BadFrame, NotReady, Refused

CHUNK_BYTES = 4 << 20
KEEP_OPEN = 3


class PublishedParams:
    """Watches params/latest.json."""

    def __init__(self, params_dir: Path) -> None:
        self._dir = params_dir
        self._stamp: tuple[int, int] | None = None
        self._latest: dict[str, Any] | None = None
        self._open: OrderedDict[int, tuple[int, dict[str, Any]]] = OrderedDict()  # version -> (file, its entry)
        self.times: dict[int, float] = {}  # version -> unix time of publishing

    @property
    def version(self) -> int | None:
        """The newest version, None before the first."""
        return None if self._latest is None else int(self._latest["version"])

    def refresh(self) -> bool:
        """Look at the pointer; True when there is another newest version."""
        try:
            stat = (self._dir / "latest.json").stat()
        except FileNotFoundError:
            return False
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp == self._stamp:
            return False
        entry = read_json(self._dir / "latest.json")
        if entry is None:
            return False
        before, self._stamp, self._latest = self.version, stamp, entry
        self.times[int(entry["version"])] = float(entry["time"])
        return before != self.version

    def chunk(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one `params` request `{version | null, offset}`. NotReady, Refused or BadFrame."""
        version, offset = payload.get("version"), payload.get("offset", 0)
        if self._latest is None:
            raise NotReady("no parameters have been published yet")
        version = self.version if version is None else version
        file, entry = self._file(version)
        if type(offset) is not int or not 0 <= offset <= entry["bytes"]:
            raise BadFrame(f"offset: expected 0..{entry['bytes']}, got {offset!r}")
        return {
            "version": version,
            "total_bytes": entry["bytes"],
            "sha256": entry["sha256"],
            "offset": offset,
            "data": np.frombuffer(os.pread(file, CHUNK_BYTES, offset), np.uint8),
        }

    def _file(self, version: Any) -> tuple[int, dict[str, Any]]:
        if version not in self._open:
            assert self._latest is not None
            if version != self.version:
                raise Refused(f"version {version!r} is not held, the newest is {self.version}")
            try:
                file = os.open(self._dir / self._latest["file"], os.O_RDONLY)
            except FileNotFoundError:
                raise NotReady(f"version {version} is being replaced, ask again") from None
            self._open[version] = (file, self._latest)
            while len(self._open) > KEEP_OPEN:
                os.close(self._open.popitem(last=False)[1][0])
        return self._open[version]
