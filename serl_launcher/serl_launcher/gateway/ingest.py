"""The way of an item: validate ─▶ journal ─▶ acknowledge ─▶ assemble ─▶ ring and ledger; and its rebuild at the start.

    data(frames) ─▶ [in flight: key → tokens] ─▶ JournalWriter thread ─▶ journalled() on the loop ─▶ reply + apply

Everything derived (ring, ledger, what was seen) is a function of the journal: `recover` reads it once, before the
sockets are served. Owned by the loop's thread; the bound is the actors' own windows of unacknowledged items.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable

from serl_launcher.gateway.actors import Actors
from serl_launcher.gateway.ledger import Ledger, LedgerRow
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.replay.assembler import Assembler, ClosedEpisode
from serl_launcher.replay.entries import CloseEntry, DataEntry, Entry, SpecEntry
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.replay.journal_writer import JournalWriter
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.replay.ring import RingError, RingWriter
from serl_launcher.run.paths import RunPaths
from serl_transport.connection.router import Peer, Reply
from serl_transport.contract.errors import BadFrame, StorageFull, WireError
from serl_transport.wire.codec import Frames
from serl_transport.wire.envelope import Envelope

log = logging.getLogger("gateway")
RATE_WINDOW_S = 10.0
SETTLE_S = 1.0  # after a newer process has delivered, its forerunner's last items get this long


class Ingest:
    """reply: answers an actor by token; post: runs a callable on the loop (thread-safe); on_closed: per ledger row."""

    def __init__(
        self,
        settings: GatewaySettings,
        paths: RunPaths,
        actors: Actors,
        reply: Callable[[bytes, Reply], None],
        post: Callable[[Callable[[], None]], None],
        on_closed: Callable[[LedgerRow], None],
    ) -> None:
        self._relabelled = Relabelled(paths.root)  # read once: labels given later count from the next start on
        self.ledger = Ledger(paths.episodes)
        self.ring = RingWriter(settings.spec, settings.capacity_frames, paths.root)
        self._settings, self._actors, self._reply, self._on_closed = settings, actors, reply, on_closed
        self._in_flight: dict[tuple[str, str, int], list[bytes]] = {}
        self._closing: set[str] = set()  # episodes whose CloseEntry is on its way to the journal
        self._ticks: deque[tuple[float, int]] = deque()  # (time.monotonic(), ticks) journalled lately
        self._newest: dict[tuple[str, str], str] = {}  # (actor, boot) -> episode of its last item
        self._problems = Problems()
        self._ledger_late = False
        self._started_ns = time.time_ns()
        self.assembler, self._writer = self._recover(paths, post)

    def data(self, peer: Peer, envelope: Envelope, frames: Frames) -> Reply | None:
        """One item of an actor. The reply is the acknowledgement, and comes once the item is on disk."""
        key = (envelope.actor_id, envelope.boot_id, envelope.seq)
        self._actors.seen(peer.actor_id)
        if key in self.assembler.seen:
            return {"duplicate": True}
        if key in self._in_flight:
            self._in_flight[key].append(envelope.token)
            return None
        try:
            if envelope.seq < 1:
                raise BadFrame(f"data: expected a seq from 1, got {envelope.seq}")
            entry = DataEntry.of(*key, frames, self._settings.spec)
            self.assembler.check(entry)
        except WireError as error:
            self._problems.note(peer.actor_id, error)
            raise
        self._in_flight[key] = [envelope.token]
        self._writer.append(entry.payload(), lambda error, time_ns: self._journalled(entry, error, time_ns))
        return None

    def close_abandoned(self) -> None:
        """Close, through the journal, the episodes whose rest will not come; call once a second."""
        for episode_id, opened in self.assembler.open.items():
            if episode_id not in self._closing and self._abandoned(episode_id):
                self._closing.add(episode_id)
                log.warning("closing episode %s as truncated: its actor is gone", opened.info.episode_id)
                entry = CloseEntry(episode_id, "dead_actor")
                self._writer.append(
                    entry.payload(), lambda error, time_ns, entry=entry: self._closed_by_journal(entry, error, time_ns)
                )

    def transitions_per_s(self) -> float:
        """Ticks journalled per second, over the last RATE_WINDOW_S."""
        now = time.monotonic()
        while self._ticks and self._ticks[0][0] < now - RATE_WINDOW_S:
            self._ticks.popleft()
        return round(sum(n for _, n in self._ticks) / RATE_WINDOW_S, 2)

    def write_ledger(self) -> None:
        """Bring episodes.jsonl up to date; a full disk is reported once and tried again, call once a second."""
        try:
            self.ledger.write()
            self._ledger_late = False
        except OSError as error:
            if not self._ledger_late:
                log.error("cannot write episodes.jsonl (%s): it lags behind the journal until there is space", error)
            self._ledger_late = True

    def report_problems(self) -> None:
        """Log how often known problems came again; call once a minute."""
        self._problems.report()

    def close(self) -> None:
        """Put what is queued on disk, then drop the ring."""
        self._writer.close()
        self.ring.close()

    def _recover(self, paths: RunPaths, post: Callable[[Callable[[], None]], None]) -> tuple[Assembler, JournalWriter]:
        started = time.monotonic()
        stream = EpisodeStream(paths.root, self._settings.spec)
        for closed in stream.poll():
            self._take(closed)
        self.write_ledger()
        first = SpecEntry(self._settings.spec).payload()
        writer = JournalWriter(paths.journal, stream.reader, post, self._settings.segment_mb << 20, first)
        if stream.reader.next_sequence:
            log.info(
                "recovered %d records: %d episodes, %d still open (%.1f s)",
                stream.reader.next_sequence,
                self.ledger.rows,
                len(stream.assembler.open),
                time.monotonic() - started,
            )
        stream.close()
        return stream.assembler, writer

    def _journalled(self, entry: DataEntry, error: StorageFull | None, time_ns: int) -> None:
        for token in self._in_flight.pop(entry.key):
            self._reply(token, error or {"duplicate": False})
        if error is not None:
            self._problems.note(entry.actor_id, error)
            return
        versions = entry.batch.arrays["policy_version"]
        if len(versions):
            self._actors.delivered(entry.actor_id, entry.boot_id, int(versions[-1]))
        self._ticks.append((time.monotonic(), entry.batch.n))
        self._newest[entry.actor_id, entry.boot_id] = entry.batch.episode.episode_id
        self._apply(entry, time_ns)

    def _closed_by_journal(self, entry: CloseEntry, error: StorageFull | None, time_ns: int) -> None:
        self._closing.discard(entry.episode_id)
        if error is not None:
            log.error("episode %s stays open: %s", entry.episode_id, error.message)
            return
        self._apply(entry, time_ns)

    def _apply(self, entry: Entry, time_ns: int) -> None:
        for closed in self.assembler.apply(entry, time_ns):
            row = self._take(closed)
            self.write_ledger()
            self._on_closed(row)

    def _take(self, closed: ClosedEpisode) -> LedgerRow:
        """A closed episode into the ledger as it was recorded, and into the ring as people corrected it."""
        episode = closed.build()
        row = LedgerRow.of(closed, episode)
        if row.mode != "eval":
            corrected = self._relabelled.correct(episode)
            try:
                self.ring.append(closed.ordinal, row.mode, corrected.outcome.success, corrected.arrays)
            except RingError as error:
                log.error("episode %s is recorded but cannot be trained on: %s", row.episode_id, error)
        self.ledger.add(row)
        return row

    def _abandoned(self, episode_id: str) -> bool:
        opened = self.assembler.open[episode_id]
        idle_s = (time.time_ns() - max(opened.time_ns, self._started_ns)) / 1e9
        if self._actors.superseded(opened.actor, opened.boot) and idle_s > SETTLE_S:
            return True
        if idle_s <= self._settings.dead_actor_s:
            return False
        # An idle episode of a living process is a person thinking, unless that process has gone on to another one.
        return not self._actors.alive(opened.actor, opened.boot) or self._went_on(episode_id)

    def _went_on(self, episode_id: str) -> bool:
        mine = self.assembler.open[episode_id]
        return self._newest.get((mine.actor, mine.boot), episode_id) != episode_id


class Problems:
    """Says each kind of trouble once in full, then only counts it."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._told: Counter[tuple[str, str]] = Counter()

    def note(self, actor: str, error: WireError) -> None:
        """One refused item."""
        key = (actor, error.code)
        self._counts[key] += 1
        if self._counts[key] == 1:
            self._told[key] = 1
            log.warning("refused an item of actor %s (%s): %s", actor, error.code, error.message)

    def report(self) -> None:
        """The counts that have grown since they were last told."""
        for key, count in self._counts.items():
            if count > self._told[key]:
                log.warning("refused %d items of actor %s so far (%s)", count, *key)
                self._told[key] = count
