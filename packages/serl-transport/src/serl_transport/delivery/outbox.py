"""Sends what the spool holds and forgets it when the learner has it.

    send_item ─▶ spool ─▶ [heap of keys, oldest first] ─▶ window (items, bytes) ─▶ data link ─▶ learner
                   ▲                                                                    │ durable ack
                   └────────────── spool.ack ◀── ledger line, fsync ◀───────────────────┘

Runs in the data link's thread. A full window waits for acknowledgements; an item that the learner can never take is set
aside, so that the items behind it are not held up for ever.
"""

import heapq
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from serl_transport.connection.link import Link
from serl_transport.contract.errors import (
    Corrupt,
    Internal,
    NotReady,
    SpoolError,
    StorageFull,
    Unauthorized,
    UnknownKind,
    WireError,
)
from serl_transport.delivery.spool import ItemKey, Spool
from serl_transport.wire.blob import blob_crc32
from serl_transport.wire.codec import Frames, nbytes, unpack

log = logging.getLogger(__name__)

WINDOW_ITEMS = 64
WINDOW_BYTES = 32 << 20
RETRY_S = 1.0
SLOW_S = 2.0  # a ledger write that took longer is reported
_RETRIED = (
    StorageFull,
    NotReady,
    Internal,
    Unauthorized,
    UnknownKind,
    Corrupt,
)  # the learner's trouble, not the item's


class Ledger:
    """Every acknowledged item as a JSON line, on disk before the spool forgets it; a line may repeat after a kill.

    `{boot, seq, crc32, episode_id, first_tick, n}`; crc32 is of `blob.join(body frames)`, which is what the learner
    journals. The fault tests compare it with what the learner holds.
    """

    def __init__(self, path: str | Path):
        self._file = open(path, "a")  # noqa: SIM115 (closed by close)
        if torn := _torn_tail(Path(path)):  # its item is in the spool still, and gets a line of its own
            log.warning("%s: cut off a torn line of %d bytes", path, torn)
            os.truncate(path, os.path.getsize(path) - torn)

    def write(self, acknowledged: list[tuple[ItemKey, Frames]]) -> None:
        """Append a line per item and wait until they are on disk."""
        started = time.monotonic()
        self._file.write("".join(json.dumps(_ledger_row(key, frames)) + "\n" for key, frames in acknowledged))
        self._file.flush()
        os.fsync(self._file.fileno())
        if (took := time.monotonic() - started) > SLOW_S:
            log.warning("the disk took %.1f s to keep the ledger: the spool forgets nothing meanwhile", took)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Outbox:
    """Owns the order and the window of one actor's data."""

    def __init__(self, link: Link, spool: Spool, ledger: Ledger | None = None):
        self.refused = 0  # items that were set aside
        self._link, self._spool, self._ledger = link, spool, ledger
        self._queue: list[ItemKey] = spool.pending()
        heapq.heapify(self._queue)
        self._in_flight: set[ItemKey] = set()
        self._in_flight_bytes = 0
        self._acknowledged: list[tuple[ItemKey, Frames]] = []
        self._paused = False
        self._progress = threading.Condition()
        if self._queue:
            log.info("re-sending %d items that earlier runs of this actor left in the spool", len(self._queue))
        link.on_ready(self._pump)

    def offer(self, key: ItemKey) -> None:
        """A new item is in the spool. Thread-safe."""
        self._link.loop.call_soon(lambda: self._enqueue(key))

    def wait(self, timeout_s: float) -> bool:
        """Wait until every item is acknowledged (or set aside); False after `timeout_s`. Thread-safe."""
        with self._progress:
            return self._progress.wait_for(lambda: not len(self._spool), timeout_s)

    def _tell(self) -> None:
        with self._progress:
            self._progress.notify_all()

    def _enqueue(self, key: ItemKey) -> None:
        heapq.heappush(self._queue, key)
        self._pump()

    def _pump(self) -> None:
        while self._queue and not self._paused and self._link.ready.is_set() and self._window_open:
            self._send(heapq.heappop(self._queue))

    @property
    def _window_open(self) -> bool:
        return len(self._in_flight) < WINDOW_ITEMS and self._in_flight_bytes < WINDOW_BYTES

    def _send(self, key: ItemKey) -> None:
        try:
            store, *frames = self._spool.read(key)
        except SpoolError as error:
            log.error("%s; the item is lost", error)
            self.refused += 1
            self._spool.ack(key)
            return
        self._in_flight.add(key)
        self._in_flight_bytes += sum(map(nbytes, frames))
        self._link.submit(
            "data",
            frames,
            lambda result: self._answered(key, frames, result),
            target=bytes(store).decode(),
            seq=key.seq,
            boot_id=key.boot_id,
        )

    def _answered(self, key: ItemKey, frames: Frames, result: Frames | WireError) -> None:
        """The learner has the item, or says why not."""
        if self._link.loop.stopping:
            return  # the item stays in the spool for the next boot
        self._in_flight.discard(key)
        self._in_flight_bytes -= sum(map(nbytes, frames))
        if not isinstance(result, WireError):
            if not self._acknowledged:
                self._link.loop.call_soon(self._commit)  # one fsync for all replies of this turn
            self._acknowledged.append((key, frames))
        elif isinstance(result, _RETRIED):
            self._retry(key, result)
        else:
            self._set_aside(key, result)
        self._pump()

    def _commit(self) -> None:
        """Make acknowledged items known: ledger first, then the spool forgets them."""
        batch, self._acknowledged = self._acknowledged, []
        try:
            if self._ledger is not None:
                self._ledger.write(batch)
        except OSError as error:
            log.error("the ledger cannot be written, trying again in %g s: %s", RETRY_S, error.strerror)
            self._acknowledged = batch
            self._link.loop.call_later(RETRY_S, self._commit)
            return
        for key, _ in batch:
            self._spool.ack(key)
        self._tell()

    def _retry(self, key: ItemKey, error: WireError) -> None:
        heapq.heappush(self._queue, key)
        if not self._paused:
            log.warning("the learner cannot take data now, trying again every %g s: %s", RETRY_S, error.message)
            self._paused = True
            self._link.loop.call_later(RETRY_S, self._resume)

    def _resume(self) -> None:
        self._paused = False
        self._pump()

    def _set_aside(self, key: ItemKey, error: WireError) -> None:
        try:
            where = self._spool.refuse(key, f"{error.code}: {error.message}")
        except OSError as failure:
            log.error("a refused item cannot be set aside: %s", failure.strerror)
            self._retry(key, error)
            return
        self.refused += 1
        log.error("the learner refused item %d (%s); %s: %s", key.seq, error.code, where, error.message)
        self._tell()


def _torn_tail(path: Path) -> int:
    """Bytes after the last newline."""
    text = path.read_bytes()
    return len(text) - (text.rfind(b"\n") + 1)


def _ledger_row(key: ItemKey, frames: Frames) -> dict[str, Any]:
    body = unpack(frames, leave_packed=True)
    episode, arrays = body.get("episode"), body.get("arrays")
    return {
        "boot": key.boot_id,
        "seq": key.seq,
        "crc32": blob_crc32(frames),
        "episode_id": episode.get("episode_id") if isinstance(episode, dict) else None,
        "first_tick": body.get("first_tick"),
        "n": len(arrays["action"]) if isinstance(arrays, dict) and "action" in arrays else None,
    }
