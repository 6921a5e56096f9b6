"""The processes that train together, a rank each: who this one is, its share of a batch, and what rank 0 decides.

    supervisor.several ── RANK, WORLD_SIZE, … ──▶ Ranks.joined() ──▶ learner.together: decide ▶ agree ▶ all do it

Decisions go over gloo from host to host: no device waits for them. One process has `Ranks.one()`, for which nothing of
this costs anything. A rank that dies closes its connections, so that the others' next word raises; a host that is gone
without a word is noticed after SILENCE_S.
"""

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SILENCE_S = 3600.0  # rank 0 gives a word each second, but where it writes a large checkpoint (half an hour at most)
FIRST_BYTES = 1024  # of a word in its first message; a longer one takes a second


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1  # ranks on all hosts
    host: int = 0  # number of this rank's host; 0 is where the gateway is
    group: dist.ProcessGroup | None = None  # gloo; None: there is one rank

    @classmethod
    def one(cls) -> "Ranks":
        """A single process."""
        return cls()

    @classmethod
    def joined(cls) -> "Ranks":
        """As the environment says (RANK, WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT); waits for the others.

        Call it after an accelerator was made, which opens the group of the devices.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls.one()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE_S))
        return cls(dist.get_rank(), world, int(os.environ.get("GROUP_RANK", "0")), group)

    @property
    def first(self) -> bool:
        """Rank 0 decides, publishes, saves and reports."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's rows of a batch of n. ValueError where there are no equal shares."""
        if n % self.world:
            raise ValueError(f"a batch of {n} rows has no equal shares for {self.world} ranks")
        own = n // self.world
        return slice(self.rank * own, (self.rank + 1) * own)

    def agree(self, decision: Any = None) -> Any:
        """What rank 0 gave, on every rank; JSON. Every rank calls it at the same place, the others without an argument.

        RuntimeError when a rank is gone.
        """
        if self.group is None:
            return decision
        said = json.dumps(decision).encode() if self.first else b""
        head = torch.zeros(8 + FIRST_BYTES, dtype=torch.uint8)
        if self.first:
            begin = len(said).to_bytes(8, "little") + said[:FIRST_BYTES]
            head[: len(begin)] = torch.frombuffer(bytearray(begin), dtype=torch.uint8)
        dist.broadcast(head, 0, group=self.group)
        length = int.from_bytes(head[:8].numpy().tobytes(), "little")
        whole = torch.zeros(max(length, FIRST_BYTES), dtype=torch.uint8)
        whole[:FIRST_BYTES] = head[8:]
        if length > FIRST_BYTES:
            if self.first:
                whole = torch.frombuffer(bytearray(said), dtype=torch.uint8)
            dist.broadcast(whole, 0, group=self.group)
        return json.loads(whole[:length].numpy().tobytes())

    def highest(self, number: int) -> int:
        """The largest of what the ranks give."""
        if self.group is None:
            return number
        found = torch.tensor([number])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return int(found)
