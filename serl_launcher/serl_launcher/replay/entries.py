"""What a journal record says: the task's spec, one accepted step batch, or the closing of an abandoned episode.

The gateway encodes, everyone who replays the journal decodes. A payload is `blob.join([head, *frames])`: a msgpack
head, and for a step batch the very frames the actor sent, so that a checksum of the one is a checksum of the other.
Pictures stay packed as the actor packed them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

from serl_launcher.replay.journal import JournalCorrupt
from serl_transport.contract.errors import BadFrame, Refused, WireError
from serl_transport.contract.packed import Packed
from serl_transport.contract.schema import StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire import blob, codec, pictures


class SpecChangedError(ValueError):
    """The run folder holds data of another task spec."""


@dataclass(frozen=True, slots=True)
class SpecEntry:
    """The first record of a journal: the task that all its batches obey."""

    spec: TaskSpec

    def payload(self) -> bytes:
        return _blob({"kind": "spec", "spec": self.spec.to_dict()})


@dataclass(frozen=True, slots=True)
class DataEntry:
    """One accepted item of an actor. (actor_id, boot_id, seq) names it once and for all."""

    actor_id: str  # the actor's unique_identifier
    boot_id: str  # the process that made the item (not always the one that delivered it)
    seq: int  # its number in that boot, from 1
    batch: StepBatch
    frames: codec.Frames = field(repr=False, compare=False)  # the item's body as it was sent

    @staticmethod
    def of(actor_id: str, boot_id: str, seq: int, frames: codec.Frames, spec: TaskSpec) -> "DataEntry":
        """Validate an item, its packed pictures aside. BadFrame when it is malformed, SchemaMismatch when it breaks the
        task's spec."""
        body = codec.unpack(frames, leave_packed=True)
        item = body["item"] if set(body) == {"item"} else body
        if not isinstance(item, dict):
            raise BadFrame(f"data: expected a step batch, got {type(item).__name__}")
        return DataEntry(actor_id, boot_id, seq, StepBatch.from_body(item, spec), frames)

    def unpacked(self) -> "DataEntry":
        """The same with its pictures unpacked. BadFrame where they are none."""
        packed = {key: array for key, array in self.batch.arrays.items() if isinstance(array, Packed)}
        if not packed:
            return self
        arrays = {**self.batch.arrays, **{key: pictures.unpacked(array) for key, array in packed.items()}}
        lossy = next((array.kind for array in packed.values() if pictures.lossy(array.kind)), None)
        return replace(self, batch=replace(self.batch, arrays=arrays, lossy=lossy))

    def check_sender(self, spec: TaskSpec) -> None:
        """What only a new item must be, beyond what `of` asks of every record of a journal.

        SchemaMismatch for a value that a later reader could not take, Refused for another's episode.
        """
        self.batch.check_ranges(spec)
        info = self.batch.episode
        for key, mine, theirs in (("actor", self.actor_id, info.actor_id), ("boot", self.boot_id, info.boot_id)):
            if mine != theirs:
                raise Refused(f"episode {info.episode_id!r}: its {key}_id is {theirs!r}, the item is of {mine!r}")

    @property
    def key(self) -> tuple[str, str, int]:
        """Identity for deduplication."""
        return self.actor_id, self.boot_id, self.seq

    @property
    def crc32(self) -> int:
        """Of the joined frames: the same number that the actor's ledger holds for this item."""
        return blob.blob_crc32(self.frames)

    def payload(self) -> list[Any]:
        """The record's bytes, as buffers that are written one after the other: the frames are not copied."""
        head = {"kind": "data", "actor_id": self.actor_id, "boot_id": self.boot_id, "seq": self.seq}
        return blob.join_parts([msgpack.packb(head), *self.frames])


@dataclass(frozen=True, slots=True)
class CloseEntry:
    """The gateway gave up waiting for the rest of an episode. Journalled, so that a replay decides the same."""

    episode_id: str
    reason: str  # an Outcome.truncated_by: dead_actor

    def payload(self) -> bytes:
        return _blob({"kind": "close", "episode_id": self.episode_id, "reason": self.reason})


@dataclass(frozen=True, slots=True)
class UnfitEntry:
    """A whole record of a step batch that would not be accepted (today). It is left out as a refused one would be.

    Older rules may have let it in, or somebody wrote it past them: that must not keep a run from going on.
    """

    actor_id: str
    boot_id: str
    seq: int
    why: str  # for people
    crc32: int  # as of a DataEntry

    @property
    def name(self) -> str:
        """`actor/boot/seq`."""
        return f"{self.actor_id}/{self.boot_id}/{self.seq}"


Entry = SpecEntry | DataEntry | CloseEntry | UnfitEntry


def decode_entry(payload: bytes, spec: TaskSpec) -> Entry:
    """The entry of a record. SpecChangedError when the journal is of another task than `spec`."""
    try:
        head, *frames = blob.split(payload)
        return _decode(msgpack.unpackb(head), frames, spec)
    except (WireError, KeyError, msgpack.UnpackException) as error:
        raise JournalCorrupt(f"a journal record of an unknown form: {error!r}") from error


def _decode(head: Mapping[str, Any], frames: codec.Frames, spec: TaskSpec) -> Entry:
    kind = head["kind"]
    if kind == "spec":
        found = TaskSpec.from_dict(head["spec"])
        lines = spec.differences(found, "configured", "in the journal")
        if lines:
            raise SpecChangedError(
                "this run folder holds data of a different task.spec (" + "; ".join(lines) + "): choose another run=…"
            )
        return SpecEntry(found)
    if kind == "data":
        who = head["actor_id"], head["boot_id"], head["seq"]
        try:
            return DataEntry.of(*who, frames, spec).unpacked()
        except WireError as error:
            return UnfitEntry(*who, error.message, blob.blob_crc32(frames))
    if kind == "close":
        return CloseEntry(head["episode_id"], head["reason"])
    raise KeyError(f"kind {kind!r}")


def _blob(head: dict[str, Any]) -> bytes:
    return blob.join([msgpack.packb(head)])
