"""Step batches to episodes, as a pure function of the journal's records in their order.

The gateway applies each entry once it is durable; the exporter, the checker and recovery apply the same entries read
back, and get the same episodes with the same ordinals. Nothing here looks at a clock or a socket.

    entry ─▶ seen before? drop ─▶ open episode: batches by first tick ─▶ gapless and final, or closed ─▶ ClosedEpisode
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serl_launcher.replay.entries import CloseEntry, DataEntry, Entry, UnfitEntry
from serl_transport.contract.errors import Refused
from serl_transport.contract.schema import Episode, EpisodeInfo, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.delivery.dedup import SeenItems


@dataclass(frozen=True, slots=True)
class ClosedEpisode:
    """A finished (or cut) episode in the order in which the journal closed it."""

    ordinal: int  # 0, 1, 2, … : the closing records in journal order
    info: EpisodeInfo  # the id of a late part is `<episode_id>~<first tick>`
    first_tick: int  # 0, or where a part starts whose beginning was closed (or lost) before
    batches: tuple[StepBatch, ...]  # contiguous, starting at tick 0
    cut_by: str | None  # why it was closed without its final batch; None: the final batch is there
    time_ns: int  # wall clock of the closing record

    @property
    def whole(self) -> bool:
        """The actor ended it, and it was seen from its first tick: its outcome may be counted."""
        return self.cut_by is None and self.first_tick == 0

    def build(self) -> Episode:
        """Join the arrays: n ticks, n+1 observations."""
        if self.cut_by is None:
            return Episode.from_batches(self.batches)
        episode = Episode.cut(self.batches, self.cut_by)
        assert episode is not None, "a cut that leaves no tick gets no ordinal"
        return episode


@dataclass(slots=True)
class OpenEpisode:
    """Batches of an episode that is still coming in."""

    info: EpisodeInfo
    actor: str  # who sent it
    boot: str  # the process that made it
    batches: dict[int, StepBatch] = field(default_factory=dict)  # first tick -> batch; a final one without ticks at n
    anchor: int = 0  # first tick of what is to come: not 0 when the beginning was cut and closed before
    time_ns: int = 0  # wall clock of the last batch
    end: int = 0  # the tick after the last one that is there
    ended: bool = False  # the final batch is there

    def add(self, batch: StepBatch) -> None:
        self.batches[batch.first_tick] = batch
        self.end = max(self.end, batch.first_tick + batch.n)
        self.ended = self.ended or batch.final

    def ordered(self) -> list[StepBatch]:
        return [self.batches[tick] for tick in sorted(self.batches)]

    def overlaps(self, batch: StepBatch) -> bool:
        """Would `batch` cover a tick that is already there, or follow the end?"""
        start, end = batch.first_tick, batch.first_tick + batch.n
        if start >= self.end and not self.ended:
            return False  # the next one in order
        for other in self.batches.values():
            if other.final and (batch.final or end > other.first_tick + other.n):
                return True
            if batch.final and other.first_tick + other.n > end:
                return True
            if start < other.first_tick + other.n and other.first_tick < end:
                return True
        return False


class Assembler:
    """State between entries: what was seen, what is open, which ordinal comes next."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        self.seen = SeenItems()
        self.open: dict[str, OpenEpisode] = {}
        self.next_ordinal = 0
        self.dropped = 0  # batches that contradicted their episode (a bug of an actor; never silent: see `check`)
        self._finished: set[str] = set()
        # Last tick of a cut episode, by id and next tick: Episode.cut drops it for want of its next observation. When
        # the rest of the episode arrives after all, the tick opens the late part, so that it is neither lost nor twice.
        self._tails: dict[str, dict[int, StepBatch]] = {}

    def check(self, entry: DataEntry) -> None:
        """Raise Refused when the batch contradicts what is known of its episode. Call before journalling."""
        info, opened = entry.batch.episode, self.open.get(entry.batch.episode.episode_id)
        if info.episode_id in self._finished:
            raise Refused(f"episode {info.episode_id!r} is finished: ticks after its final batch cannot be kept")
        if opened is not None and opened.info != info:
            raise Refused(f"episode {info.episode_id!r}: expected {opened.info}, got {info}")
        if opened is not None and opened.overlaps(entry.batch):
            raise Refused(f"episode {info.episode_id!r}: tick {entry.batch.first_tick} came before under another seq")

    def apply(self, entry: Entry, time_ns: int) -> list[ClosedEpisode]:
        """Take one entry; the episodes it closed (several when a cut episode has holes)."""
        if isinstance(entry, DataEntry):
            return self._add(entry, time_ns)
        if isinstance(entry, CloseEntry):
            return self._cut(entry, time_ns)
        if isinstance(entry, UnfitEntry):
            self.seen.add(entry.actor_id, entry.boot_id, entry.seq)  # its actor need not send it again
        return []

    def _add(self, entry: DataEntry, time_ns: int) -> list[ClosedEpisode]:
        if not self.seen.add(*entry.key):
            return []
        try:
            self.check(entry)
        except Refused:
            self.dropped += 1
            return []
        batch = entry.batch
        episode_id = batch.episode.episode_id
        opened = self.open.get(episode_id)
        if opened is None:
            opened = self.open[episode_id] = OpenEpisode(batch.episode, entry.actor_id, entry.boot_id)
        tail = self._tails.get(episode_id, {}).pop(batch.first_tick, None)
        if tail is not None:
            opened.add(tail)
            opened.anchor = tail.first_tick
        opened.add(batch)
        opened.time_ns = time_ns
        if not opened.ended:
            return []
        ordered = opened.ordered()
        if not ordered[-1].final or len(_runs(ordered)) != 1 or ordered[0].first_tick != opened.anchor:
            return []
        del self.open[episode_id]
        self._finished.add(episode_id)
        self._tails.pop(episode_id, None)
        return self._close(ordered, None, time_ns)

    def _cut(self, entry: CloseEntry, time_ns: int) -> list[ClosedEpisode]:
        opened = self.open.pop(entry.episode_id, None)
        if opened is None:
            return []  # its final batch came between the decision and its record
        closed: list[ClosedEpisode] = []
        tails = self._tails.setdefault(entry.episode_id, {})
        for run in _runs(opened.ordered()):
            if run[-1].final:
                self._finished.add(entry.episode_id)
                closed += self._close(run, None, time_ns)
            else:
                tails[run[-1].first_tick + run[-1].n] = _last_tick(run[-1])
                closed += self._close(run, entry.reason, time_ns)
        if entry.episode_id in self._finished:
            self._tails.pop(entry.episode_id)
        return closed

    def _close(self, run: Sequence[StepBatch], cut_by: str | None, time_ns: int) -> list[ClosedEpisode]:
        """Number one contiguous run. A run without a whole tick (nothing to learn from) gets no ordinal."""
        ticks = sum(batch.n for batch in run) - (cut_by is not None)
        if ticks < 1:
            return []
        first = run[0].first_tick
        info = run[0].episode
        if first:
            info = replace(info, episode_id=f"{info.episode_id}~{first}")
            run = [replace(batch, episode=info, first_tick=batch.first_tick - first) for batch in run]
        closed = ClosedEpisode(self.next_ordinal, info, first, tuple(run), cut_by, time_ns)
        self.next_ordinal += 1
        return [closed]


def _runs(ordered: Sequence[StepBatch]) -> list[list[StepBatch]]:
    """Split batches, sorted by first tick, wherever a tick is missing."""
    runs: list[list[StepBatch]] = []
    for batch in ordered:
        if runs and runs[-1][-1].first_tick + runs[-1][-1].n == batch.first_tick:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return runs


def _last_tick(batch: StepBatch) -> StepBatch:
    """The batch's last tick alone, copied so that the rest can be freed."""
    arrays = {key: rows[-1:].copy() for key, rows in batch.arrays.items()}
    return replace(batch, first_tick=batch.first_tick + batch.n - 1, arrays=arrays)
