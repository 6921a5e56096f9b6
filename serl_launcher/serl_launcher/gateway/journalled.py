"""What comes of an item once it is on disk: acknowledge ─▶ assemble ─▶ ring and ledger; and its rebuild at the start.

Everything derived (ring, ledger, what was seen) is a function of the journal: `recover` reads it once, before the
sockets are served. Owned by the loop's thread.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from serl_launcher.gateway.actors import Actors
from serl_launcher.gateway.ledger import Ledger, LedgerRow, listed_rows
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.replay.assembler import ClosedEpisode
from serl_launcher.replay.entries import DataEntry, Entry
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.replay.filling import fill
from serl_launcher.replay.journal import JournalCorrupt, JournalReader, how_to_recover
from serl_launcher.replay.ring import RingWriter
from serl_launcher.run.paths import RunPaths
from serl_transport.connection.router import Reply
from serl_transport.contract.errors import Refused, WireError

log = logging.getLogger("gateway")
RATE_WINDOW_S = 10.0


class Journalled:
    """reply: answers an actor by token; on_closed: told of each new ledger row."""

    def __init__(
        self,
        settings: GatewaySettings,
        paths: RunPaths,
        actors: Actors,
        reply: Callable[[bytes, Reply], None],
        on_closed: Callable[[LedgerRow], None],
    ) -> None:
        # By the gateway before: ordinal -> episode id.
        self._listed = {row["ordinal"]: row["episode_id"] for row in listed_rows(paths.episodes)}
        self.ledger = Ledger(paths.episodes)
        self.ring = RingWriter(settings.spec, settings.capacity_frames, paths.root, memory_share=settings.memory_share)
        self._paths, self._actors, self._reply, self._on_closed = paths, actors, reply, on_closed
        self._ticks: deque[tuple[float, int]] = deque()  # (time.monotonic(), ticks) journalled lately
        self._ledger_late = False
        self._stream = EpisodeStream(paths.root, settings.spec)
        self.assembler = self._stream.assembler

    def recover(self) -> JournalReader:
        """Read the journal from its beginning; the reader stands at its end. JournalCorrupt."""
        started, reader = time.monotonic(), self._stream.reader
        for closed in self._stream.poll():
            self._add(closed)
        for unfit in self._stream.take_unfit():
            log.error("item %s of the journal does not fit and is left out: %s", unfit.name, unfit.why)
        self._check_listed()
        self.write_ledger()
        if reader.next_sequence:
            log.info(
                "recovered %d records: %d episodes, %d still open (%.1f s)",
                reader.next_sequence,
                self.ledger.rows,
                len(self.assembler.open),
                time.monotonic() - started,
            )
        self._stream.close()
        return reader

    def _check_listed(self) -> None:
        """What episodes.jsonl lists was journalled before: where the mark is gone, too, it still testifies."""
        closed = self.assembler.next_ordinal
        lost = [episode_id for ordinal, episode_id in self._listed.items() if ordinal >= closed]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise JournalCorrupt(
                f"{self._paths.journal} ends too early: {self._paths.episodes} lists {closed + len(lost)} episodes, "
                f"the journal closes {closed}. Missing: {', '.join(lost[:3])}{more}. {how_to_recover(self._paths.root)}"
            )
        self._listed.clear()

    def take(self, entry: DataEntry, tokens: Sequence[bytes], error: WireError | None, time_ns: int) -> None:
        """An item is on disk, or `error` says why not: tell those who wait for it, then use it."""
        answer: Reply = error or {"duplicate": False}
        if error is None:
            try:  # again: another item that was on its way with this one may have said otherwise first
                self.assembler.check(entry)
            except Refused as contradiction:
                answer = contradiction
        for token in tokens:
            self._reply(token, answer)
        if error is not None:
            return
        versions = entry.batch.arrays["policy_version"]
        if len(versions):
            self._actors.delivered(entry.actor_id, entry.boot_id, int(versions[-1]))
        self._ticks.append((time.monotonic(), entry.batch.n))
        self.apply(entry, time_ns)

    def hang_up(self) -> None:
        """Nobody is there to be answered any more; actors send again what was not acknowledged."""
        self._reply = lambda token, result: None

    def apply(self, entry: Entry, time_ns: int) -> None:
        """A record of the journal, which may close episodes."""
        for closed in self.assembler.apply(entry, time_ns):
            row = self._add(closed)
            self.write_ledger()
            self._on_closed(row)

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

    def _add(self, closed: ClosedEpisode) -> LedgerRow:
        """A closed episode into the ledger and into the ring, as it was recorded: a person's later word is the views'.

        What was discarded at the robot does not enter the ring: no view, whatever its rule, ever samples it.
        """
        episode = closed.build()
        row = LedgerRow.of(closed, episode)
        fill(self.ring, closed, episode)
        self.ledger.add(row)
        return row
