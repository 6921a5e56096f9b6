"""Puts imported episodes into a run's journal, by the rules that an actor's items obey; the gateway is not there yet.

    Demonstration ─▶ StepBatch ─▶ DataEntry: validated as an item of an actor is ─▶ JournalWriter: write, fdatasync

What the journal holds is asked first, so that an import that was cut goes on where it was, item by item.
"""

import queue
import time
from collections.abc import Callable, Iterator

from serl_launcher.importer.demonstrations import Arrays, Demonstration
from serl_launcher.replay.entries import DataEntry, SpecEntry
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.replay.journal_writer import JournalLock, JournalWriter
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.errors import StorageFull
from serl_transport.contract.schema import EpisodeInfo, Outcome, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire.codec import pack
from serl_transport.wire.pictures import LOSSLESS

RETRY_S = 10.0  # until a full disk is asked again


class JournalImport:
    """The journal of a run without a gateway, opened for appending. stage: what imported episodes count towards.

    Raises JournalCorrupt, SpecChangedError, RunFolderBusyError, StorageFull.
    """

    def __init__(self, paths: RunPaths, spec: TaskSpec, stage: str, segment_bytes: int) -> None:
        self._spec, self._stage = spec, stage
        self._lock = JournalLock(paths.journal)
        stream = EpisodeStream(paths.root, spec)
        # Episodes that are there whole; a late part has the id of its episode in front of the ~.
        self.done = {closed.info.episode_id.split("~")[0] for closed in stream.poll() if closed.cut_by is None}
        self._assembler = stream.assembler
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        first = SpecEntry(spec).payload()
        self._writer = JournalWriter(paths.journal, stream.reader, self._posted.put, segment_bytes, first)
        stream.close()

    def close(self) -> None:
        """Everything is on disk; the gateway may come."""
        self._writer.close()
        self._lock.release()

    def add(
        self, actor: str, demonstration: Demonstration, items: Iterator[Arrays], tell: Callable[[str], None]
    ) -> None:
        """One episode; on disk when this returns. actor: whose it is called. WireError: a value that is none of the
        task's; a full disk is told and waited for."""
        info, tick = self._info(actor, demonstration), 0
        for seq, arrays in enumerate(items, 1):
            n = len(arrays["action"])
            final = tick + n == demonstration.n
            outcome = Outcome(True, "human", None) if final else None
            batch = StepBatch(info, tick, arrays, final, outcome)
            entry = DataEntry.of(info.actor_id, info.boot_id, seq, pack(batch.to_body(), pictures=LOSSLESS), self._spec)
            entry.check_sender(self._spec)
            if entry.key not in self._assembler.seen:
                self._assembler.check(entry)
                self._assembler.apply(entry, self._append(entry, tell))
            tick += n

    def _info(self, actor: str, demonstration: Demonstration) -> EpisodeInfo:
        """Of an episode that was begun, as it was begun."""
        opened = self._assembler.open.get(demonstration.episode_id)
        if opened is not None:
            return opened.info
        return EpisodeInfo(
            episode_id=demonstration.episode_id,
            actor_id=actor,
            boot_id=demonstration.episode_id,
            task=self._spec.name,
            prompt=demonstration.prompt,
            mode="demo",
            stage=self._stage,
            seed=demonstration.number,
            start_time=time.time(),
        )

    def _append(self, entry: DataEntry, tell: Callable[[str], None]) -> int:
        """The record's wall clock, once it is on disk."""
        while True:
            came: list[tuple[StorageFull | None, int]] = []
            self._writer.append(entry.payload(), lambda error, time_ns, came=came: came.append((error, time_ns)))
            self._posted.get()()
            ((error, time_ns),) = came
            if error is None:
                return time_ns
            tell(f"{error.message}; trying again every {RETRY_S:g} s")
            time.sleep(RETRY_S)
