"""A link to nobody: evaluates a policy in this process when `ip=null`, on the seeds that a learner would hand out.

Called by `wiring`; answers `link.LearnerLink`. Nothing is recorded but evaluation.csv and videos.
"""

from typing import Any

from serl_transport.contract.errors import UnknownKind
from serl_transport.delivery.spool import new_boot_id

FIRST_EVAL_SEED = 1_000_000
_STAGE = "alone"


class StandaloneLink:
    """Hands out evaluation tickets, one after the other, without end: `rollout.episodes` is the limit."""

    backlog = 0
    refused_items = 0
    over = None
    watched = False

    def __init__(self) -> None:
        self.boot_id = new_boot_id()
        self._next_seed = FIRST_EVAL_SEED

    def request(self, type: str, payload: dict[str, Any], *, timeout_ms: float) -> dict[str, Any]:
        """The next seed's ticket."""
        if type == "leave":
            return {}
        if type != "next_episode":
            raise UnknownKind(f"request {type!r} needs a learner; set ip=")
        seed = self._next_seed
        self._next_seed += 1
        return {
            "action": "run",
            "episode_id": f"{_STAGE}-{seed}-{self.boot_id}",
            "mode": "eval",
            "stage": _STAGE,
            "seed": seed,
            "min_version": 0,
            "takeover": False,
        }

    def infer(self, body: dict[str, Any], *, timeout_ms: float) -> dict[str, Any]:
        """Nobody to ask."""
        raise UnknownKind("ip=null has no policy server; set rollout.policy=local, openpi or groot")

    def send_item(self, body: dict[str, Any]) -> None:
        """Nobody to send to."""

    def set_status(self, **status: Any) -> None:
        """Nobody to tell."""

    def flush(self, timeout_s: float) -> bool:
        """Nothing is pending."""
        return True

    def stop(self) -> None:
        """Nothing to close."""
