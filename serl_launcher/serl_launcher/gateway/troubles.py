"""What ails the roles of this run, for the status document and the actors' screens. Owned by the gateway.

    supervisor ─▶ take(), once a second ─┐
    trainer ─▶ progress ─────────────────┴▶ current() ─▶ status `troubles`, every heartbeat's reply

The gateway adds what only it can see: a supervisor that says nothing any more, a disk that keeps nothing.
"""

import time
from typing import Any

from serl_launcher.gateway.ingest import Ingest
from serl_launcher.gateway.progress import TrainerProgress
from serl_launcher.run.alive import is_watched
from serl_transport.connection.router import Peer
from serl_transport.contract.errors import BadFrame
from serl_transport.wire.envelope import Envelope

SILENT_S = 5.0


class Troubles:
    """ingest: asked for its oldest item that waits for the disk; progress: for what the trainer goes on without."""

    def __init__(self, ingest: Ingest, progress: TrainerProgress) -> None:
        self._ingest, self._progress = ingest, progress
        self._roles: dict[str, str] = {}
        self._told: float | None = None  # time.monotonic() of its last word, at first of our first look; None: nobody

    def take(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> None:
        """The supervisor's `troubles`; no reply."""
        roles = body.get("roles")
        if not isinstance(roles, dict) or not all(isinstance(text, str) for text in roles.values()):
            raise BadFrame(f"troubles: expected roles: {{name: text}}, got {roles!r}")
        self._roles, self._told = roles, time.monotonic()

    def current(self) -> dict[str, str]:
        """Role -> what is wrong with it, in words; empty when all is well."""
        found = dict(self._roles)
        if self._told is None and is_watched():  # whoever started this process may be silent from its first moment on
            self._told = time.monotonic()
        silent_s = 0.0 if self._told is None else time.monotonic() - self._told
        if silent_s > SILENT_S:
            found = {"supervisor": f"silent for {silent_s:.0f} s: a role that dies is not started again"}
        found |= self._progress.troubles
        if (waits_s := self._ingest.waits_s()) > SILENT_S:
            found["journal"] = f"has kept nothing for {waits_s:.0f} s: the disk is slow, nothing is acknowledged"
        return found
