"""What people asked of the run and holds, for the gateway: read from the ledger of acts at the start, kept by `keep`.

    request ─▶ operating.py (is it possible?) ─▶ keep ─▶ acts.jsonl, fsync ─▶ in force here, in the status, in the roles

Acts of other processes (tools/audit_reward.py --relabel) are taken in once a second. A pause of an older release
(operator.json) holds until the first act about it; where that file is damaged it is taken for one.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.run.acts import ActsLedger, Row
from serl_launcher.run.files import DamagedFileError, read_sealed
from serl_launcher.run.in_force import InForce
from serl_launcher.run.live_settings import LiveConfig, in_force
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.bounds import shown
from serl_transport.contract.errors import BadFrame, StorageFull

log = logging.getLogger("gateway")
SHOWN = 200  # acts in one answer to `acts`


class OperatorState:
    """config: as config.yaml has it, plain containers. Raises ValueError where relabelled.json is damaged."""

    def __init__(self, paths: RunPaths, config: Mapping[str, Any]) -> None:
        self.config = config
        self.ledger = ActsLedger(paths.root)
        Relabelled(paths.root)
        if not any(row["act"] in ("pause", "resume") for row in self.ledger.rows) and _was_paused(paths):
            self.keep({"act": "pause"}, by="operator.json")
        self._notes = ThreadPoolExecutor(1, "note")
        for actor, by in dict(self.state.keys).items():
            self.note({"act": "release_keys", "actor": actor, "why": "the gateway ended"}, by)
        self._of: InForce | None = None  # what `_live` was made of
        for line in self.live.passed_over:
            log.warning("%s", line)

    @property
    def state(self) -> InForce:
        return self.ledger.state

    @property
    def live(self) -> LiveConfig:
        """The config with what people changed."""
        if self._of is not (state := self.ledger.state):
            self._of, self._live = state, in_force(self.config, state)
        return self._live

    def known(self, act_id: str | None) -> Row | None:
        """The act with this id, if it was kept."""
        return next((row for row in self.ledger.rows if act_id is not None and row.get("id") == act_id), None)

    def keep(self, act: Mapping[str, Any], by: str) -> Row:
        """Keep one act; it is on disk and in force when this returns. StorageFull: it is not, and nothing changed.

        An act whose id is known is not kept again; its row is returned.
        """
        before = self.state.acts
        try:
            row = self.ledger.append(act, by=by)[0]
        except OSError as error:
            why = error.strerror or str(error)
            raise StorageFull(f"cannot write {self.ledger.path} ({why}): nothing was changed") from None
        if row["n"] > before:
            log.warning("operator %s: %s", row["by"], describe(row))
        return row

    def note(self, act: Mapping[str, Any], by: str) -> None:
        """Keep what has happened already, on a thread: a slow disk holds nobody up who drives."""
        self._notes.submit(_note, self.ledger.path.parent, dict(act), by)

    def paused(self, actor: str) -> str | None:
        """Why this actor waits, for people; None: it does not."""
        if self.state.paused:
            return f"an operator paused the run ({self.state.paused})"
        by = self.state.paused_actors.get(actor)
        return f"an operator paused {actor} ({by})" if by else None

    def listed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer an `acts` request `{after?: n}`: the newest acts behind that number, oldest first. BadFrame."""
        after = body.get("after", 0)
        if not isinstance(after, int) or isinstance(after, bool):
            raise BadFrame(f"acts: expected after as the number of an act, got {shown(after)}")
        rows = [row for row in self.ledger.rows if row["n"] > after]
        return {"acts": rows[-SHOWN:], "of": len(self.ledger.rows)}

    def to_status(self) -> dict[str, Any]:
        """The `operator` part of the status document."""
        state, live = self.state, self.live
        return {
            "paused": state.paused is not None,
            "stopped": state.stopped is not None,
            "publish_requests": state.publish_requests,
            "publish_wanted": state.wanted,
            "paused_by": state.paused,
            "paused_actors": dict(state.paused_actors),
            "keys": dict(state.keys),
            "training_paused": state.training_paused,
            "served": state.served,
            "settings": {key: asdict(setting) for key, setting in live.settings.items()},
            "passed_over": live.passed_over,
            "ended_stages": sorted(live.ended),
            "words": sum(word.success is not None or word.use is not None for word in state.words.values()),
            "acts": state.acts,
            "damaged": list(state.damaged),
        }

    def troubles(self) -> dict[str, str]:
        """For the status document's `troubles`."""
        if not (lines := self.state.damaged):
            return {}
        which = ", ".join(map(str, lines))
        return {
            "acts": f"line {which} of acts.jsonl is damaged, what was asked there is not known: robots and training "
            "are held until somebody says resume and training_resume"
        }


def _note(run_dir: Path, act: dict[str, Any], by: str) -> None:
    try:
        (row,) = ActsLedger(run_dir).append(act, by=by)
        log.warning("operator %s: %s", by, describe(row))
    except OSError as error:
        log.warning("operator %s: %s (not in the ledger: %s)", by, describe(act), error.strerror or error)


def describe(row: Mapping[str, Any]) -> str:
    """An act in one line, for people."""
    said = {key: value for key, value in row.items() if key not in ("n", "id", "time", "by", "act", "goals", "trains")}
    return " ".join([row["act"], *(f"{key}={shown(value)}" for key, value in said.items())])


def _was_paused(paths: RunPaths) -> bool:
    path = paths.root / "operator.json"
    try:
        return bool((read_sealed(path, ["paused"], ["paused"]) or {}).get("paused", False))
    except DamagedFileError as damage:
        log.warning("%s: the run is taken for paused until an operator says resume (tools/operate.py)", damage)
        return True
