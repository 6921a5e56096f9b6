"""What a journal record says: the task's spec, one accepted step batch, or the closing of an abandoned episode.

The gateway encodes, everyone who replays the journal decodes. An entry is a codec body joined into one blob.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serl_launcher.replay.journal import JournalCorrupt
from serl_transport import codec
from serl_transport.errors import WireError
from serl_transport.schema import StepBatch
from serl_transport.specs import TaskSpec


class SpecChangedError(ValueError):
    """The run folder holds data of another task spec."""


@dataclass(frozen=True, slots=True)
class SpecEntry:
    """The first record of a journal: the task that all its batches obey."""

    spec: TaskSpec

    def payload(self) -> bytes:
        """The record's bytes."""
        return _blob({"kind": "spec", "spec": self.spec.to_dict()})


@dataclass(frozen=True, slots=True)
class DataEntry:
    """One accepted item of an actor. (actor_id, boot_id, seq) names it once and for all."""

    actor_id: str  # the actor's unique_identifier
    boot_id: str  # the process that made the item (not always the one that delivered it)
    seq: int  # its number in that boot
    batch: StepBatch

    @property
    def key(self) -> tuple[str, str, int]:
        """Identity for deduplication."""
        return self.actor_id, self.boot_id, self.seq

    def payload(self) -> bytes:
        """The record's bytes."""
        return _blob(
            {
                "kind": "data",
                "actor_id": self.actor_id,
                "boot_id": self.boot_id,
                "seq": self.seq,
                "item": self.batch.to_body(),
            }
        )


@dataclass(frozen=True, slots=True)
class CloseEntry:
    """The gateway gave up waiting for the rest of an episode. Journalled, so that a replay decides the same."""

    episode_id: str
    reason: str  # an Outcome.truncated_by: dead_actor

    def payload(self) -> bytes:
        """The record's bytes."""
        return _blob({"kind": "close", "episode_id": self.episode_id, "reason": self.reason})


Entry = SpecEntry | DataEntry | CloseEntry


def decode_entry(payload: bytes, spec: TaskSpec) -> Entry:
    """The entry of a record. SpecChangedError when the journal is of another task than `spec`."""
    try:
        body = codec.unpack(codec.split(payload))
        return _decode(body, spec)
    except (WireError, KeyError) as error:
        raise JournalCorrupt(f"a journal record of an unknown form: {error!r}") from error


def _decode(body: Mapping[str, Any], spec: TaskSpec) -> Entry:
    kind = body["kind"]
    if kind == "spec":
        found = TaskSpec.from_dict(body["spec"])
        lines = spec.differences(found, "configured", "in the journal")
        if lines:
            raise SpecChangedError(
                "this run folder holds data of a different task.spec (" + "; ".join(lines) + "): choose another run=…"
            )
        return SpecEntry(found)
    if kind == "data":
        batch = StepBatch.from_body(body["item"], spec)
        return DataEntry(body["actor_id"], body["boot_id"], body["seq"], batch)
    if kind == "close":
        return CloseEntry(body["episode_id"], body["reason"])
    raise KeyError(f"kind {kind!r}")


def _blob(body: dict[str, Any]) -> bytes:
    return codec.join(codec.pack(body))
