"""The way of an item to the disk: validate ─▶ journal; what comes after it is `journalled.py`'s.

    data(frames) ─▶ checked ─▶ [in flight: key → tokens] ─▶ JournalWriter thread ─▶ Journalled.take on the loop
                                                           (unpacks the pictures)

Owned by the loop's thread; the bound is the actors' own windows of unacknowledged items.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serl_launcher.gateway.actors import Actors
from serl_launcher.gateway.journalled import Journalled
from serl_launcher.gateway.seal import Seal
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.replay.entries import CloseEntry, DataEntry, SpecEntry
from serl_launcher.replay.journal import JournalReader
from serl_launcher.replay.journal_writer import JournalWriter
from serl_launcher.run.paths import RunPaths
from serl_transport.connection.bounded import Bounded
from serl_transport.connection.router import Peer, Reply
from serl_transport.contract.errors import BadFrame, NotReady, StorageFull, WireError
from serl_transport.wire.codec import Frames
from serl_transport.wire.envelope import Envelope

log = logging.getLogger("gateway")
REFUSED_S = 10.0  # so long the last refusal of the disk stands
# What one actor may have between the socket and the disk. Its own window is smaller; each process that it left behind
# has one as well.
ITEMS, BYTES = 512, 256 << 20
WAITING = 8  # connections that are told of one item: whoever sent it again
KINDS = 1024  # (actor, code) of refusals that are counted
OPEN = 8  # episodes of one actor that have begun and not ended; it makes one at a time
SETTLE_S = 1.0  # after a newer process has delivered, its forerunner's last items get this long


class Ingest:
    """reader: at the journal's end; post: runs a callable on the loop (thread-safe); seal: whose an episode is."""

    def __init__(
        self,
        settings: GatewaySettings,
        paths: RunPaths,
        actors: Actors,
        journalled: Journalled,
        reader: JournalReader,
        post: Callable[[Callable[[], None]], None],
        seal: Seal,
    ) -> None:
        self._seal = seal
        self._settings, self._actors, self._journalled = settings, actors, journalled
        self._in_flight: dict[tuple[str, str, int], list[bytes]] = {}  # item -> who waits for its acknowledgement
        self._since: dict[tuple[str, str, int], float] = {}  # the same items -> time.monotonic() of their arrival
        self._closing: set[str] = set()  # episodes whose CloseEntry is on its way to the journal
        self._loads: dict[str, _Load] = {}  # actor -> what of it is in flight
        self._newest: Bounded[tuple[str, str], str] = Bounded(
            4096, "processes of actors"
        )  # -> episode of its last item
        self.problems = Problems()
        self._started = time.monotonic()
        self._heard: dict[str, float] = {}  # open episode -> time.monotonic() of its last item in this process
        self._refused = (-math.inf, "")  # time.monotonic() of the last record that the disk refused, and why
        first = SpecEntry(settings.spec).payload()
        self._writer = JournalWriter(paths.journal, reader, post, settings.segment_mb << 20, first)

    def data(self, peer: Peer, envelope: Envelope, frames: Frames) -> Reply | None:
        """One item of an actor. The reply is the acknowledgement, and comes once the item is on disk."""
        key = (envelope.actor_id, envelope.boot_id, envelope.seq)
        assembler = self._journalled.assembler
        self._actors.seen(peer.actor_id)
        if key in assembler.seen:
            return {"duplicate": True}
        if key in self._in_flight:
            self._in_flight[key] = [*self._in_flight[key][1 - WAITING :], envelope.token]
            return None
        try:
            if envelope.seq < 1:
                raise BadFrame(f"data: expected a seq from 1, got {envelope.seq}")
            entry = DataEntry.of(*key, frames, self._settings.spec)
            entry.check_sender(self._settings.spec)
            assembler.check(entry)
            if entry.batch.episode.episode_id not in assembler.open:  # an open one's is the same, by `check`
                self._check_new(entry)
            size = self._take_load(entry)
        except WireError as error:
            self.problems.note(peer.actor_id, error)
            raise
        self._in_flight[key], self._since[key] = [envelope.token], time.monotonic()
        unpacked = entry

        def unpack() -> None:  # on the journal's thread
            nonlocal unpacked
            unpacked = entry.unpacked()

        def done(error: WireError | None, time_ns: int) -> None:
            del self._since[key]
            self._drop_load(entry.actor_id, size)
            if error is None:
                self._heard[entry.batch.episode.episode_id] = time.monotonic()
                self._refused = (-math.inf, "")
                self._newest[entry.actor_id, entry.boot_id] = entry.batch.episode.episode_id
            else:
                if isinstance(error, StorageFull):
                    self._refused = (time.monotonic(), error.message)
                self.problems.note(entry.actor_id, error)
            self._journalled.take(unpacked, self._in_flight.pop(key), error, time_ns)

        self._writer.append(entry.payload(), done, unpack)
        return None

    @property
    def storage(self) -> str | None:
        """Why the disk takes no records now, for people. Actors try again every second: an older word is no news."""
        since, why = self._refused
        return why if time.monotonic() - since < REFUSED_S else None

    def _check_new(self, entry: DataEntry) -> None:
        """The first item of an episode: Refused when it is another's, NotReady when its actor has too many open."""
        self._seal.check(entry.batch.episode)
        self._journalled.ledger.check_stage(entry.batch.episode.stage)
        if sum(opened.actor == entry.actor_id for opened in self._journalled.assembler.open.values()) >= OPEN:
            raise NotReady(
                f"{OPEN} episodes of {entry.actor_id!r} are open, as many as one actor may have: ask again; those that "
                f"nothing comes for are closed after {self._settings.dead_actor_s:g} s"
            )

    def _take_load(self, entry: DataEntry) -> int:
        """Count one more item in flight; its size. NotReady when its actor has too much there."""
        load = self._loads.setdefault(entry.actor_id, _Load())
        size = sum(array.nbytes for array in entry.batch.arrays.values())  # of packed pictures what they unpack to
        if load.items and (load.items >= ITEMS or load.nbytes + size > BYTES):
            raise NotReady(
                f"{load.items} items of {entry.actor_id!r}, {load.nbytes >> 20} MiB, wait for the disk: ask again"
            )
        load.items += 1
        load.nbytes += size
        return size

    def _drop_load(self, actor: str, size: int) -> None:
        load = self._loads[actor]
        load.items -= 1
        load.nbytes -= size
        if not load.items:
            del self._loads[actor]

    def close_abandoned(self) -> None:
        """Close, through the journal, the episodes whose rest will not come; call once a second."""
        still_open = self._journalled.assembler.open
        self._heard = {episode_id: at for episode_id, at in self._heard.items() if episode_id in still_open}
        for episode_id, opened in still_open.items():
            if episode_id not in self._closing and self._abandoned(episode_id):
                self._closing.add(episode_id)
                log.warning("closing episode %s as truncated: its actor is gone", opened.info.episode_id)
                self._close(CloseEntry(episode_id, "dead_actor"))

    def _close(self, entry: CloseEntry) -> None:
        def done(error: WireError | None, time_ns: int) -> None:
            self._closing.discard(entry.episode_id)
            if error is None:
                self._journalled.apply(entry, time_ns)
            else:
                log.error("episode %s stays open: %s", entry.episode_id, error.message)

        self._writer.append(entry.payload(), done)

    @property
    def writing(self) -> bool:
        """Is the journal's thread there?"""
        return self._writer.alive

    def waits_s(self) -> float:
        """How long the oldest item has waited for the disk; 0: none waits."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0

    def close(self) -> None:
        """Put what is queued on disk."""
        self._writer.close()

    def _abandoned(self, episode_id: str) -> bool:
        opened = self._journalled.assembler.open[episode_id]
        idle_s = time.monotonic() - self._heard.get(episode_id, self._started)
        if self._actors.superseded(opened.actor, opened.boot) and idle_s > SETTLE_S:
            return True
        if idle_s <= self._settings.dead_actor_s:
            return False
        # An idle episode of a living process is a person thinking, unless that process has gone on to another one.
        went_on = self._newest.get((opened.actor, opened.boot), episode_id) != episode_id
        return went_on or not self._actors.alive(opened.actor, opened.boot)


@dataclass(slots=True)
class _Load:
    """What of one actor is on its way to the disk."""

    items: int = 0
    nbytes: int = 0


class Problems:
    """Says each kind of trouble once in full, then only counts it."""

    def __init__(self) -> None:
        self._counts: Bounded[tuple[str, str], int] = Bounded(KINDS, "kinds of trouble of actors")
        self._told: Bounded[tuple[str, str], int] = Bounded(KINDS, "kinds of trouble that were told")

    def note(self, actor: str, error: WireError) -> None:
        """One refused item."""
        key = (actor, error.code)
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self._told[key] = 1
            log.warning("refused an item of actor %s (%s): %s", actor, error.code, error.message)

    def report(self) -> None:
        """Log the counts that have grown since they were last told; call once a minute."""
        for key, count in self._counts.items():
            if count > self._told.get(key, 0):
                log.warning("refused %d items of actor %s so far (%s)", count, *key)
                self._told[key] = count
