"""What an operator asked of the run: pause, resume, publish, stop. The gateway's tickets and status obey it.

A pause outlives a restart of the gateway (operator.json); a stop does not, so that the next start of the run goes on.
Where the file is damaged nobody knows whether the run was paused, and it is taken for paused.
"""

import logging
from pathlib import Path
from typing import Any

from serl_launcher.run.files import DamagedFileError, read_sealed, write_sealed
from serl_transport.contract.errors import StorageFull

log = logging.getLogger("gateway")


class OperatorState:
    """path: the file that keeps the pause."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.paused: bool = _was_paused(path)  # actors wait between episodes
        self.stopped = False  # the run ends as if every stage were done
        self.publish_requests = 0  # the trainer publishes when this has grown

    def take(self, request: str, name: str) -> bool:
        """Obey one request of `name`; False when it changes nothing. StorageFull when a pause cannot be kept."""
        before = (self.paused, self.stopped, self.publish_requests)
        match request:
            case "pause" | "resume":
                self._keep(request == "pause")
            case "stop":
                self.stopped = True
            case "publish":
                self.publish_requests += 1
        changed = before != (self.paused, self.stopped, self.publish_requests)
        if changed:
            log.warning("operator %s: %s", name, request)
        return changed

    def to_status(self) -> dict[str, Any]:
        """The `operator` part of the status document."""
        return {"paused": self.paused, "stopped": self.stopped, "publish_requests": self.publish_requests}

    def _keep(self, paused: bool) -> None:
        if paused == self.paused:
            return
        try:
            write_sealed(self._path, {"paused": paused})
        except OSError as error:
            raise StorageFull(f"cannot write {self._path} ({error.strerror}): nothing was changed") from None
        self.paused = paused


def _was_paused(path: Path) -> bool:
    try:
        return bool((read_sealed(path, ["paused"], ["paused"]) or {}).get("paused", False))
    except DamagedFileError as damage:
        log.warning("%s: the run is taken for paused until an operator says resume (tools/operate.py)", damage)
        return True
