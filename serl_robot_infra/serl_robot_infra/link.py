"""The actor's view of the learner: what it needs of `serl_transport.client.TrainerClient`, and the tickets it gets.

Called by the actor loop. Requests go out, typed tickets come back; anything else a learner might say is refused here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from serl_transport.contract.errors import BadFrame
from serl_transport.contract.schema import MODES


class LearnerLink(Protocol):
    """One connection to a learner. Calls raise a `WireError`; `ServerSilent` when no reply came."""

    boot_id: str
    """This process's boot, as recorded in its episodes."""

    def send_item(self, body: dict[str, Any]) -> object:
        """Spool one step batch; it is kept until the learner acknowledged it. Raises SpoolFull."""
        ...

    def request(self, type: str, payload: dict[str, Any], *, timeout_ms: float) -> dict[str, Any]:
        """One request of docs/contracts/requests.md."""
        ...

    def infer(self, body: dict[str, Any], *, timeout_ms: float) -> dict[str, Any]:
        """One chunk of actions for one observation."""
        ...

    @property
    def backlog(self) -> int:
        """Items that are spooled and not acknowledged."""
        ...

    @property
    def over(self) -> str | None:
        """Why the learner has no more tickets, as it last said; None while its run goes on."""
        ...

    @property
    def refused_items(self) -> int:
        """Items that the learner will never take."""
        ...

    def set_status(self, **status: Any) -> None:
        """What heartbeats tell the learner."""
        ...

    @property
    def watched(self) -> bool:
        """Does somebody look at this run at the learner's console?"""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is unacknowledged; False after `timeout_s`."""
        ...

    def stop(self) -> None:
        """Close; what is unacknowledged stays in the spool."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Run one episode."""

    episode_id: str  # its name in the journal
    mode: str  # demo | online | eval
    stage: str  # name of the schedule's stage
    seed: int  # of the environment's reset
    min_version: int  # the oldest policy version that may drive it
    takeover: bool  # whether the operator may take over
    rollout: Mapping[str, Any] = field(default_factory=dict)  # key -> {value, by}: what people changed of `rollout`


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do yet."""

    seconds: float  # ask again after this
    reason: str  # for people


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over."""

    reason: str  # for people


Ticket = Run | Wait | Stop


def parse_ticket(reply: Mapping[str, Any]) -> Ticket:
    """The ticket of a `next_episode` reply; BadFrame names what is missing or unknown."""
    try:
        match reply["action"]:
            case "run":
                return _parse_run(reply)
            case "wait":
                return Wait(seconds=float(reply["seconds"]), reason=str(reply["reason"]))
            case "stop":
                return Stop(reason=str(reply["reason"]))
            case action:
                raise BadFrame(f"next_episode: expected action run, wait or stop, got {action!r}")
    except KeyError as error:
        raise BadFrame(f"next_episode: the learner's reply lacks {error}") from None


def _parse_run(reply: Mapping[str, Any]) -> Run:
    if reply["mode"] not in MODES:
        raise BadFrame(f"next_episode: expected mode {', '.join(MODES)}, got {reply['mode']!r}")
    return Run(
        episode_id=str(reply["episode_id"]),
        mode=reply["mode"],
        stage=str(reply["stage"]),
        seed=int(reply["seed"]),
        min_version=int(reply["min_version"]),
        takeover=bool(reply["takeover"]),
        rollout=dict(reply.get("rollout") or {}),
    )
