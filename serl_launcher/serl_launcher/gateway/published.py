"""Published parameters as the gateway sees them: which version is newest, and its bytes in chunks for who pulls.

The trainer writes params/ (serl_launcher.run.parameters); the gateway only reads. A file that is being pulled is
kept mapped, so that the trainer may prune it meanwhile, and sent straight from the page cache.
"""

import mmap
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from serl_launcher.run.files import read_json
from serl_transport.contract.bounds import check_name
from serl_transport.contract.errors import NotReady, Refused
from serl_transport.parameters.params import Offer, read_chunk

KEEP_OPEN = 3


class PublishedParams:
    """Watches params/latest.json."""

    def __init__(self, params_dir: Path) -> None:
        self._dir = params_dir
        self._latest: dict[str, Any] | None = None
        self._open: OrderedDict[int, Offer] = OrderedDict()  # by version
        self._looked = False  # what the first look finds was published some time before
        self.times: dict[int, float] = {}  # version -> time.monotonic() of its publishing, if we were there

    @property
    def version(self) -> int | None:
        """The newest version, None before the first."""
        return None if self._latest is None else int(self._latest["version"])

    def refresh(self) -> bool:
        """Look at the pointer; True when there is another newest version."""
        there, self._looked = self._looked, True
        entry = read_json(self._dir / "latest.json")
        if entry is None or entry == self._latest:
            return False
        before, self._latest = self.version, entry
        if there:
            self.times.setdefault(int(entry["version"]), time.monotonic())
        return before != self.version

    def chunk(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one `params` request `{version | null, number}`. NotReady, Refused or BadFrame."""
        version = payload.get("version")
        if self._latest is None:
            raise NotReady("no parameters have been published yet")
        version = self.version if version is None else version
        return read_chunk(self._offer(version), payload | {"version": version})

    def _offer(self, version: Any) -> Offer:
        if version not in self._open:
            assert self._latest is not None
            if version != self.version:
                raise Refused(f"version {version!r} is not held, the newest is {self.version}")
            try:
                path = self._dir / check_name("latest.json: file", self._latest["file"])
                with path.open("rb") as file:  # only ever replaced, never changed
                    blob = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            except FileNotFoundError:
                raise NotReady(f"version {version} is being replaced, ask again") from None
            self._open[version] = Offer.of(version, blob, self._latest["sha256"])
            while len(self._open) > KEEP_OPEN:
                self._open.popitem(last=False)
        return self._open[version]
