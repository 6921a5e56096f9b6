"""Published parameters as the gateway sees them: which version is newest, and its bytes in chunks for who pulls.

    latest.json ─▶ look (the loop, 4/s) ─▶ thread: compare with the sha256 ─▶ post ─▶ announced, handed out

The trainer writes params/ (serl_launcher.run.versions); the gateway only reads. A file that is being pulled is kept
mapped, so that the trainer may prune it meanwhile, and sent straight from the page cache. A version that an operator
pinned is told of and handed out in place of the newest.
"""

import logging
import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from serl_launcher.run.versions import PublishedVersion, newest_whole, versions_told
from serl_transport.contract.errors import NotReady, Refused
from serl_transport.parameters.params import Offer, read_chunk

log = logging.getLogger("gateway")
KEEP_OPEN = 3
RETRY_S = 10.0  # after a disk that could not be read


class PublishedParams:
    """Watches params/. post: runs a callable on the loop (thread-safe); on_newer: told of each newer version, there."""

    def __init__(
        self, params_dir: Path, post: Callable[[Callable[[], None]], None], on_newer: Callable[[int], None]
    ) -> None:
        self._dir, self._post, self._on_newer = params_dir, post, on_newer
        self._told = PublishedVersion.read(params_dir)
        self._newest: PublishedVersion | None = None
        self._pinned: int | None = None
        self._open: OrderedDict[int, Offer] = OrderedDict()  # by version
        self.times: dict[int, float] = {}  # version -> time.monotonic() of its publishing, if we were there
        self._take(newest_whole(params_dir))
        self.times.clear()  # what the first look finds was published some time before

    @property
    def version(self) -> int | None:
        """The newest whole version, None before the first."""
        return None if self._newest is None else self._newest.version

    @property
    def served(self) -> int | None:
        """The pinned version, else the newest whole one."""
        return self.version if self._pinned is None else self._pinned

    def pin(self, version: int | None) -> None:
        """Hand this one out from now on; None: the newest."""
        if version == self._pinned:
            return
        self._pinned = version
        if self.served is not None:
            self._on_newer(self.served)

    def troubles(self) -> dict[str, str]:
        """For the status document: a pinned version that is gone."""
        if self._pinned is None or self._pinned in versions_told(self._dir):
            return {}
        return {"pinned": f"version {self._pinned} is pinned and is not in {self._dir}: serve another one"}

    def look(self) -> None:
        """Look at the pointer; another one is compared with its checksum, on a thread of its own, then told of."""
        told = PublishedVersion.read(self._dir)
        if told is not None and told != self._told:
            self._told = told
            threading.Thread(target=self._check, args=(time.monotonic(),), name="parameter-check", daemon=True).start()

    def _check(self, seen: float) -> None:
        try:
            whole = newest_whole(self._dir)
        except OSError as error:
            log.error("cannot look for parameters in %s: %s; trying again", self._dir, error.strerror)
            time.sleep(RETRY_S)
            self._told = None
            return
        self._post(partial(self._take, whole, seen))

    def _take(self, whole: PublishedVersion | None, seen: float = 0.0) -> None:
        """What a check has found; a check that began earlier may end later."""
        if whole is None or (self.version is not None and whole.version <= self.version):
            return
        self._newest = whole
        self.times[whole.version] = seen
        if self._pinned is None:
            self._on_newer(whole.version)
        else:
            log.info("policy version %d is published; version %d is pinned", whole.version, self._pinned)

    def chunk(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one `params` request `{version | null, number}`. NotReady, Refused or BadFrame."""
        version = payload.get("version")
        if self._newest is None:
            raise NotReady("no parameters have been published yet")
        version = self.served if version is None else version
        return read_chunk(self._offer(version), payload | {"version": version})

    def _offer(self, version: Any) -> Offer:
        if version not in self._open:
            if version not in (self.version, self._pinned):
                raise Refused(f"version {version!r} is not held, the newest is {self.version}")
            entry = self._newest if version == self.version else versions_told(self._dir).get(version)
            if entry is None:
                raise NotReady(f"version {version} is pinned and is gone: an operator must serve another one")
            try:
                with (self._dir / entry.file).open("rb") as file:  # only ever replaced, never changed
                    blob = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            except FileNotFoundError:
                raise NotReady(f"version {version} is being replaced, ask again") from None
            self._open[version] = Offer.of(version, blob, entry.sha256)
            while len(self._open) > KEEP_OPEN:
                self._open.popitem(last=False)
        return self._open[version]
