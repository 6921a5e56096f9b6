"""What people asked of a run and still holds: a fold of its acts. `run.acts` reads and keeps them.

Pure: the same lines give the same state in every process, today and after any restart.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)
DAMAGED = "damaged"
NOBODYS = ("start", "published", DAMAGED)  # acts that no person asked for
WORDS = ("accept", "reject", "success", "failure", "discard", "clear")  # of a verdict


@dataclass(frozen=True, slots=True)
class Word:
    """What a person said of one episode afterwards."""

    success: bool | None = None  # relabelled so; None: as recorded
    use: str | None = None  # accept | reject, in place of the rule's verdict; discard; None: as the rule says
    act: int = 0  # number of the last act on this episode
    by: str = ""
    time: str = ""  # ISO 8601


@dataclass(frozen=True, slots=True)
class Setting:
    """A key that a person changed in the running training."""

    value: Any
    was: Any  # of the config then; a start that types another value has the last word
    by: str
    time: str


@dataclass(frozen=True, slots=True)
class EndedStage:
    """A stage that a person ended before its goals."""

    goals: Mapping[str, int | None]  # steps, episodes then; a stage that is given others goes on
    act: int
    version: int | None  # that the trainer published of it; None: not yet, or there was nothing to publish
    trains: bool  # did it wait for that?


@dataclass(slots=True)
class InForce:
    """The state after some acts."""

    acts: int = 0  # number of the last one
    paused: str | None = None  # by whom, all actors
    paused_actors: dict[str, str] = field(default_factory=dict)  # actor -> by whom
    training_paused: str | None = None  # by whom
    stopped: str | None = None  # by whom; until the next start
    keys: dict[str, str] = field(default_factory=dict)  # actor -> who drives it from a page
    served: int | None = None  # the pinned policy version
    words: dict[str, Word] = field(default_factory=dict)  # by episode id
    settings: dict[str, Setting] = field(default_factory=dict)  # by key
    ended: dict[str, EndedStage] = field(default_factory=dict)  # by stage
    publish_requests: int = 0
    wanted: int = 0  # number of the last act that asks the trainer to publish; 0: none, or it did
    damaged: list[int] = field(default_factory=list)  # lines since the last resume

    def _start(self, row: Mapping[str, Any]) -> None:
        self.stopped = None

    def _stop(self, row: Mapping[str, Any]) -> None:
        self.stopped = row["by"]

    def _pause(self, row: Mapping[str, Any]) -> None:
        if (actor := row.get("actor")) is None:
            self.paused = row["by"]
        else:
            self.paused_actors[actor] = row["by"]

    def _resume(self, row: Mapping[str, Any]) -> None:
        if (actor := row.get("actor")) is None:
            self.paused = None
            self.paused_actors.clear()
            self.damaged.clear()
        else:
            self.paused_actors.pop(actor, None)

    def _take_keys(self, row: Mapping[str, Any]) -> None:
        self.keys[row["actor"]] = row["by"]

    def _release_keys(self, row: Mapping[str, Any]) -> None:
        self.keys.pop(row["actor"], None)

    def _training_pause(self, row: Mapping[str, Any]) -> None:
        self.training_paused = row["by"]

    def _training_resume(self, row: Mapping[str, Any]) -> None:
        self.training_paused = None

    def _verdict(self, row: Mapping[str, Any]) -> None:
        said, old = row["word"], self.words.get(row["episode_id"], Word())
        success, use = old.success, old.use
        if said == "clear":
            success = use = None
        elif said in ("success", "failure"):
            success = said == "success"
        else:
            use = said
        self.words[row["episode_id"]] = Word(success, use, row["n"], row["by"], row["time"])

    def _serve(self, row: Mapping[str, Any]) -> None:
        self.served = row.get("version")

    def _set(self, row: Mapping[str, Any]) -> None:
        self.settings[row["key"]] = Setting(row["value"], row["was"], row["by"], row["time"])

    def _publish(self, row: Mapping[str, Any]) -> None:
        self.publish_requests += 1
        self.wanted = row["n"]

    def _end_stage(self, row: Mapping[str, Any]) -> None:
        self.ended[row["stage"]] = EndedStage(row["goals"], row["n"], None, row["trains"])
        if row["trains"]:
            self.wanted = row["n"]

    def _published(self, row: Mapping[str, Any]) -> None:
        """The trainer did what acts up to `of` asked for."""
        if self.wanted <= row["of"]:
            self.wanted = 0
        for name, stage in self.ended.items():
            if stage.trains and stage.version is None and stage.act <= row["of"]:
                self.ended[name] = EndedStage(stage.goals, stage.act, row["version"], True)

    def _damaged(self, row: Mapping[str, Any]) -> None:
        self.paused = self.training_paused = "a damaged line of acts.jsonl"
        self.damaged.append(row["line"])


def fold(rows: Iterable[Mapping[str, Any]]) -> InForce:
    """The state after these lines."""
    state = InForce()
    for number, row in enumerate(rows, start=1):
        state.acts = row["n"]
        try:
            getattr(state, f"_{row['act']}")(row)
        except (AttributeError, KeyError, TypeError):  # of a newer release, or mended by hand
            state._damaged({"line": number})
    return state
