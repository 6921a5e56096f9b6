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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serl_transport import bundle
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


@dataclass(frozen=True, slots=True)
class _Item:
    """An item of the spool, read to be sent."""

    key: ItemKey
    store: str  # name of the data store
    frames: Frames  # of the body
    size: int  # bytes of the frames

    def joins(self, alone: set[ItemKey]) -> bool:
        """Whether it may travel with others."""
        return self.key not in alone


class Outbox:
    """Owns the order and the window of one actor's data."""

    def __init__(self, link: Link, spool: Spool, ledger: Ledger | None = None):
        self.refused = 0  # items that were set aside
        self._link, self._spool, self._ledger = link, spool, ledger
        self._queue: list[ItemKey] = spool.pending()
        heapq.heapify(self._queue)
        self._in_flight: dict[ItemKey, Frames] = {}
        self._in_flight_bytes = 0
        self._full = False  # the window; it opens again once there is room for a whole message of several items
        self._ahead: _Item | None = None  # read from the spool, and did not fit into the last message
        self._alone: set[ItemKey] = set()  # were in a message that was refused as a whole
        self._acknowledged: list[tuple[ItemKey, Frames]] = []
        self._paused = False
        self._progress = threading.Condition()
        self._awaited: list[int] = []  # what each waiting thread waits for: so many items or fewer
        if self._queue:
            log.info("re-sending %d items that earlier runs of this actor left in the spool", len(self._queue))
        link.on_ready(self._pump)

    def offer(self, key: ItemKey) -> None:
        """A new item is in the spool. Thread-safe."""
        self._link.loop.call_soon(lambda: self._enqueue(key))

    def wait(self, timeout_s: float, at_most: int) -> bool:
        """Wait until all items but `at_most` are acknowledged (or set aside); False after `timeout_s`. Thread-safe."""
        with self._progress:
            self._awaited.append(at_most)
            try:
                return self._progress.wait_for(lambda: len(self._spool) <= at_most, timeout_s)
            finally:
                self._awaited.remove(at_most)

    def _tell(self) -> None:
        """Wake those for whom enough is acknowledged."""
        with self._progress:
            if self._awaited and len(self._spool) <= max(self._awaited):
                self._progress.notify_all()

    def _enqueue(self, key: ItemKey) -> None:
        heapq.heappush(self._queue, key)
        self._pump()

    def _pump(self) -> None:
        while self._queue and not self._paused and self._link.ready.is_set() and self._window_open():
            items = self._next_items()
            if items:
                self._send(items)

    def _window_open(self) -> bool:
        items, size = len(self._in_flight), self._in_flight_bytes
        if self._full:
            self._full = items > WINDOW_ITEMS - bundle.MAX_ITEMS or size > WINDOW_BYTES - bundle.MAX_BYTES
        else:
            self._full = items >= WINDOW_ITEMS or size >= WINDOW_BYTES
        return not self._full

    def _next_items(self) -> list["_Item"]:
        """The oldest item, and those behind it that are waiting as well and fit into one message with it."""
        first = self._read(heapq.heappop(self._queue))
        if first is None:
            return []
        items, size = [first], first.size
        while self._queue and len(items) < bundle.MAX_ITEMS and size < bundle.MAX_BYTES and first.joins(self._alone):
            key = self._queue[0]
            if key.boot_id != first.key.boot_id or key in self._alone:
                break
            item = self._read(key)
            if item is not None and (item.store != first.store or size + item.size > bundle.MAX_BYTES):
                self._ahead = item
                break
            heapq.heappop(self._queue)
            if item is not None:
                items.append(item)
                size += item.size
        return items

    def _read(self, key: ItemKey) -> "_Item | None":
        if self._ahead is not None and self._ahead.key == key:
            item, self._ahead = self._ahead, None
            return item
        try:
            store, *frames = self._spool.read(key)
        except SpoolError as error:
            log.error("%s; the item is lost", error)
            self.refused += 1
            self._spool.ack(key)
            return None
        return _Item(key, bytes(store).decode(), frames, sum(map(nbytes, frames)))

    def _send(self, items: list["_Item"]) -> None:
        first = items[0]
        for item in items:
            self._in_flight[item.key] = item.frames
            self._in_flight_bytes += item.size
        if len(items) == 1:
            kind, seq, frames = "data", first.key.seq, first.frames
        else:
            kind, seq, frames = bundle.ITEMS, 0, [bundle.write([(item.key.seq, item.frames) for item in items])]
        self._link.submit(
            kind,
            frames,
            lambda result: self._answered(items, result),
            target=first.store,
            seq=seq,
            boot_id=first.key.boot_id,
        )

    def _answered(self, items: list["_Item"], result: Frames | WireError) -> None:
        if self._link.loop.stopping:
            return  # the items stay in the spool for the next boot
        for item in items:
            del self._in_flight[item.key]
            self._in_flight_bytes -= item.size
        if len(items) == 1:
            self._settle(items[0], result if isinstance(result, WireError) else None)
        else:
            self._settle_all(items, result)
        self._pump()

    def _settle_all(self, items: list["_Item"], result: Frames | WireError) -> None:
        if isinstance(result, WireError) and not isinstance(result, _RETRIED):
            # The message was wrong, not each of its items: whose fault it is shows when they go alone.
            self._alone.update(item.key for item in items)
            for item in items:
                heapq.heappush(self._queue, item.key)
            return
        if isinstance(result, WireError):
            refused = dict.fromkeys(range(len(items)), result)
        else:
            try:
                refused = bundle.refusals(unpack(result) if result else {}, len(items))
            except WireError as error:
                refused = dict.fromkeys(range(len(items)), Internal(f"a reply that says nothing: {error.message}"))
        for index, item in enumerate(items):
            self._settle(item, refused.get(index))

    def _settle(self, item: "_Item", error: WireError | None) -> None:
        """The learner has the item, or says why not."""
        if error is None:
            if not self._acknowledged:
                self._link.loop.call_soon(self._commit)  # one fsync for all replies of this turn
            self._acknowledged.append((item.key, item.frames))
            self._alone.discard(item.key)
        elif isinstance(error, _RETRIED):
            self._retry(item.key, error)
        else:
            self._alone.discard(item.key)
            self._set_aside(item.key, error)

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


def _ledger_row(key: ItemKey, frames: Frames) -> dict[str, Any]:
    body = unpack(frames)
    episode, arrays = body.get("episode"), body.get("arrays")
    return {
        "boot": key.boot_id,
        "seq": key.seq,
        "crc32": blob_crc32(frames),
        "episode_id": episode.get("episode_id") if isinstance(episode, dict) else None,
        "first_tick": body.get("first_tick"),
        "n": len(arrays["action"]) if isinstance(arrays, dict) and "action" in arrays else None,
    }
