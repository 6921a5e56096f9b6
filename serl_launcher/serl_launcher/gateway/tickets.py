"""Tickets: what each actor does next, and which seed it does it with.

    actor ── next_episode ─▶ issue() ─▶ run (sealed id, seed) | wait | stop          ledger row ─▶ finish()

A ticket lives from its issue until its episode is in the ledger. It is void when its actor's process is gone, or when
the actor has asked for the next one and the episode has not come for `grace_s`; its seed is then issued again.
"""

import hashlib
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from serl_launcher.gateway.seal import Seal
from serl_launcher.run.schedule import FIRST_EVAL_SEED, Stage

WAIT_S = 0.2
HELD = 16  # tickets of one actor whose episodes are still awaited
Scope = tuple[str, ...]  # (stage name,) or, for what an actor asked for itself, (stage name, actor, boot)


@dataclass(slots=True)
class Ticket:
    """An episode somebody was asked to make."""

    episode_id: str
    scope: Scope
    seed: int
    actor: str
    boot: str
    released_at: float | None = None  # when its actor asked for the next one; its last items may still be on the way


@dataclass(frozen=True, slots=True)
class ScopeCounts:
    """What the ledger knows of a scope."""

    counted: int  # episodes that count towards the goal
    seeds: Set[int]  # eval: seeds with an outcome


class TicketOffice:
    """Issues tickets. run_seed: the run's `seed`; alive(actor, boot): is that process still there?"""

    def __init__(self, run_seed: int, grace_s: float, alive: Callable[[str, str], bool], seal: Seal) -> None:
        self._run_seed = run_seed
        self._seal = seal
        self._grace_s = grace_s
        self._alive = alive
        self._live: dict[str, Ticket] = {}  # whose episode is not in the ledger yet
        self._issued: dict[str, int] = {}  # stage name -> seeds drawn so far

    def restore(self, ticket: Ticket) -> None:
        """An episode that was open when the gateway was killed."""
        self._live[ticket.episode_id] = ticket

    def skip_seeds(self, stage: str, started: int) -> None:
        """Never draw again the seeds of episodes that exist already."""
        self._issued[stage] = max(self._issued.get(stage, 0), started)

    def open(self) -> list[Ticket]:
        """Of actors that are there, or that this gateway has not heard of yet, and have not asked for the next one."""
        live = self._live.values()
        return [ticket for ticket in live if ticket.released_at is None and self._alive(ticket.actor, ticket.boot)]

    def finish(self, episode_id: str) -> None:
        """The episode is in the ledger (a late part carries the id of its episode before the ~)."""
        self._live.pop(episode_id.split("~")[0], None)

    def issue(
        self, stage: Stage, scope: Scope, counts: ScopeCounts, actor: str, boot: str, min_version: int, now: float
    ) -> dict[str, Any]:
        """The reply to `next_episode` for an actor that works in `scope`."""
        self._void_stale(actor, boot, now)
        if sum(ticket.actor == actor for ticket in self._live.values()) >= HELD:
            return wait(WAIT_S, f"{HELD} episodes of {actor} are awaited already")
        held = [ticket for ticket in self._live.values() if ticket.scope == scope]
        # Episodes on their way may be all that is missing; with a steps goal the stage goes on regardless.
        if stage.episodes and not stage.steps and len(held) >= stage.episodes - counts.counted:
            return wait(WAIT_S, f"the last episodes of stage {stage.name} are on their way")
        seed = self._seed(stage, counts.seeds | {ticket.seed for ticket in held})
        if seed is None:
            return wait(WAIT_S, f"every seed of stage {stage.name} is taken")
        ticket = Ticket(self._seal.episode_id(stage.name, stage.mode, seed, actor, boot), scope, seed, actor, boot)
        self._live[ticket.episode_id] = ticket
        return {
            "action": "run",
            "episode_id": ticket.episode_id,
            "mode": stage.mode,
            "stage": stage.name,
            "seed": seed,
            "min_version": min_version,
            "takeover": stage.takeover,
        }

    def release(self, actor: str, boot: str, now: float) -> None:
        """That process is done with the tickets it has: it asks what is next."""
        for ticket in self._live.values():
            if (ticket.actor, ticket.boot) == (actor, boot) and ticket.released_at is None:
                ticket.released_at = now

    def _void_stale(self, actor: str, boot: str, now: float) -> None:
        self.release(actor, boot, now)
        for ticket in list(self._live.values()):
            late = ticket.released_at is not None and now - ticket.released_at > self._grace_s
            if late or not self._alive(ticket.actor, ticket.boot):
                del self._live[ticket.episode_id]

    def _seed(self, stage: Stage, taken: Set[int]) -> int | None:
        if stage.mode == "eval":
            # Without a goal the seeds go on for ever; the range below is only where the first free one must lie.
            span = stage.episodes or len(taken) + 1
            return next((stage.first_seed + i for i in range(span) if stage.first_seed + i not in taken), None)
        index = self._issued.get(stage.name, 0)
        self._issued[stage.name] = index + 1
        return training_seed(self._run_seed, stage.name, index)


def training_seed(run_seed: int, stage: str, index: int) -> int:
    """Seed of the index-th episode of a stage: below FIRST_EVAL_SEED, so that no evaluation ever shares it."""
    digest = hashlib.sha256(f"{run_seed}/{stage}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % FIRST_EVAL_SEED


def wait(seconds: float, reason: str) -> dict[str, Any]:
    return {"action": "wait", "seconds": seconds, "reason": reason}


def stop(reason: str) -> dict[str, Any]:
    return {"action": "stop", "reason": reason}
