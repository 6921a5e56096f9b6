"""The episode ledger: one line per closed episode in episodes.jsonl, and the counts and rates drawn from it.

Derived from the journal: rewritten at the gateway's start, appended to while it runs (`write`). The schedule, the
tickets and the status document read it; so do people, with any tool that reads JSON lines.
"""

import contextlib
import errno
import json
import os
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serl_launcher.gateway.tickets import Scope, ScopeCounts
from serl_launcher.replay.assembler import ClosedEpisode
from serl_launcher.replay.filling import is_experience
from serl_launcher.run.files import seal, unseal, write_whole
from serl_launcher.telemetry.statistics import wilson
from serl_transport.contract.errors import Refused
from serl_transport.contract.schema import Episode

WINDOW = 40  # online episodes that the rates look back on
ADHOC = "adhoc_"
STAGES = 256  # names of stages that are counted
SCOPES = 1024  # processes whose own episodes are counted


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One closed episode."""

    episode_id: str
    ordinal: int  # journal ordinal
    actor: str
    boot: str
    mode: str  # demo | online | eval
    stage: str
    seed: int
    n_ticks: int
    episode_return: float  # sum of rewards; `return` in the file
    success: bool
    interventions: int  # ticks the operator drove
    policy_version_first: int
    policy_version_last: int
    truncated_by: str | None
    whole: bool  # seen from its first tick to the task's own end (not cut, not stopped); only these count
    start_time: float  # unix s, the actor's clock
    end_time: float  # unix s, journalled by the gateway
    seconds: float  # from the first tick to the end, by the actor's monotonic clock
    drivers: tuple[str, ...] = ()  # who drove some of its ticks, by name, or `script`
    judge: str | None = None  # the person who said how it ended; None: nobody did
    lossy: tuple[str, ...] = ()  # how its pictures were packed where that changed pixels, `jpeg:90`

    @staticmethod
    def of(closed: ClosedEpisode, episode: Episode) -> "LedgerRow":
        """The line of a closed episode."""
        arrays, info, outcome = episode.arrays, episode.info, episode.outcome
        versions = arrays["policy_version"]
        return LedgerRow(
            episode_id=info.episode_id,
            ordinal=closed.ordinal,
            actor=info.actor_id,
            boot=info.boot_id,
            mode=info.mode,
            stage=info.stage,
            seed=info.seed,
            n_ticks=episode.n,
            episode_return=float(np.sum(arrays["next.reward"], dtype=np.float64)),
            success=outcome.success,
            interventions=int(np.count_nonzero(arrays["intervention"])),
            policy_version_first=int(versions[0]),
            policy_version_last=int(versions[-1]),
            truncated_by=outcome.truncated_by,
            whole=closed.whole and outcome.truncated_by in (None, "time_limit"),
            start_time=info.start_time,
            end_time=closed.time_ns / 1e9,
            seconds=_seconds(arrays["time_ns"]),
            drivers=episode.drivers,
            judge=outcome.judge,
            lossy=episode.lossy,
        )

    @property
    def is_experience(self) -> bool:
        """May anything be learned from it? Not from evaluations, nor from what a person threw away."""
        return is_experience(self.mode, self.truncated_by)

    def to_json(self) -> str:
        """One line of episodes.jsonl."""
        row = asdict(self)
        row["return"] = row.pop("episode_return")
        return json.dumps(seal(row))


@dataclass(slots=True)
class Evaluated:
    """What an evaluation stage has so far."""

    episodes: int = 0  # finished seeds
    successes: int = 0  # among them
    version: int = -1  # the newest policy that acted


def listed_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an episodes.jsonl, none where there is no file; one that is torn or damaged says nothing."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, AttributeError):
            rows.append(unseal(json.loads(line), needed=("ordinal", "episode_id", "n_ticks")))
    return rows


class Ledger:
    """Counts of all rows, and their lines in `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = 0
        self.successes = 0  # demonstrations and online episodes; what is imitated is the trainer's to say
        self.interventions = 0  # ticks
        self.transitions = 0  # ticks of closed episodes
        self.experience = 0  # those of demonstrations and online episodes that nobody discarded
        self.per_mode = {"demo": 0, "online": 0, "eval": 0}
        self.started: dict[str, int] = {}  # stage -> rows of any kind
        self.known: dict[str, tuple[int, str, str | None]] = {}  # episode id -> ordinal, mode, truncated_by
        self._counted: dict[Scope, int] = {}
        self._seeds: dict[Scope, dict[int, bool]] = {}  # eval: seed -> success of its first whole outcome
        self._evaluated: dict[str, Evaluated] = {}  # by stage
        self._since: dict[str, int] = {}  # ad hoc stage -> the version from which on its evaluations count
        self._adhoc: OrderedDict[Scope, None] = OrderedDict()  # by their last episode: of processes that come and go
        self._online: deque[tuple[bool, bool]] = deque(maxlen=WINDOW)  # (success without help, had help)
        self._file: int | None = None
        self._length = 0  # of the file, bytes
        self._lines: list[str] = []  # not in the file yet

    def write(self) -> None:
        """Put new lines into the file; the first time the whole file is replaced. OSError leaves it as it was."""
        block = "".join(self._lines).encode()
        if self._file is None:
            write_whole(self._path, lambda part: part.write_bytes(block))
            self._file = os.open(self._path, os.O_WRONLY)
        elif block:
            try:
                written = os.pwrite(self._file, block, self._length)
                if written < len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file, self._length)
                raise
        self._length += len(block)
        self._lines.clear()

    def add(self, row: LedgerRow) -> None:
        """Count a row; `write` puts its line into the file."""
        self.rows += 1
        self.known[row.episode_id] = (row.ordinal, row.mode, row.truncated_by)
        self.interventions += row.interventions
        self.transitions += row.n_ticks
        if row.is_experience:
            self.successes += row.success
            self.experience += row.n_ticks
        self.per_mode[row.mode] += 1
        self.started[row.stage] = self.started.get(row.stage, 0) + 1
        if row.whole:
            self._count(row)
        self._lines.append(row.to_json() + "\n")

    def _count(self, row: LedgerRow) -> None:
        scope = scope_of(row.stage, row.actor, row.boot)
        if row.mode == "online":
            self._online.append((row.success and not row.interventions, row.interventions > 0))
        if row.mode == "eval":
            finished = self._evaluated.setdefault(row.stage, Evaluated())
            if len(scope) > 1 and scope not in self._seeds and row.policy_version_last > finished.version:
                finished.episodes = finished.successes = 0  # asked for again, of a later version
                self._since[row.stage] = row.policy_version_last
            old = row.policy_version_last < self._since.get(row.stage, -1)
            seeds = self._seeds.setdefault(scope, {})
            finished.version = max(finished.version, row.policy_version_last)
            if row.seed not in seeds:
                seeds[row.seed] = row.success
                finished.episodes += not old
                finished.successes += row.success and not old
            self._counted[scope] = len(seeds)
        elif row.mode == "online" or row.success:
            self._counted[scope] = self._counted.get(scope, 0) + 1
        if len(scope) > 1:
            self._forget_old(scope)

    def _forget_old(self, newest: Scope) -> None:
        """What a process asked for itself counts for that process, and only the last SCOPES of them are kept."""
        self._adhoc[newest] = None
        self._adhoc.move_to_end(newest)
        if len(self._adhoc) > SCOPES:
            old, _ = self._adhoc.popitem(last=False)
            self._counted.pop(old, None)
            self._seeds.pop(old, None)

    def check_stage(self, stage: str) -> None:
        """Raise Refused for one more name than is remembered: without tickets an actor may make them up."""
        if stage not in self.started and len(self.started) >= STAGES:
            raise Refused(f"stage {stage!r}: this run has episodes of {STAGES} stages, as many as are counted")

    def scope(self, scope: Scope) -> ScopeCounts:
        """What tickets need to know."""
        return ScopeCounts(self._counted.get(scope, 0), self._seeds.get(scope, {}).keys())

    def stage_episodes(self) -> dict[str, int]:
        """Stage -> episodes that count towards its goal."""
        return {scope[0]: count for scope, count in self._counted.items() if len(scope) == 1}

    def evaluations(self) -> dict[str, dict[str, int]]:
        """Stage -> finished evaluation seeds, successes among them, and the newest policy version that acted.

        Ad hoc ones of all actors together, from the version on with which the last process began that had a newer one.
        """
        return {stage: asdict(finished) for stage, finished in self._evaluated.items()}

    def rates(self) -> dict[str, float | None]:
        """Success without help and share of helped episodes over the last WINDOW online ones; None before the first."""
        n = len(self._online)
        wins, helped = sum(win for win, _ in self._online), sum(had for _, had in self._online)
        low, high = wilson(wins, n) if n else (None, None)
        return {
            "success_rate": wins / n if n else None,
            "success_low": low,
            "success_high": high,
            "intervention_rate": helped / n if n else None,
        }

    def counts(self) -> dict[str, Any]:
        """The `counts` part of the status document."""
        return {
            "episodes": self.rows,
            "successes": self.successes,
            "demos": self.per_mode["demo"],
            "online": self.per_mode["online"],
            "eval": self.per_mode["eval"],
            "interventions": self.interventions,
            "transitions": self.transitions,
            "experience": self.experience,
        }


def _seconds(time_ns: np.ndarray) -> float:
    """Of n ticks, by when each began; the last one is taken to be as long as they are on average."""
    n = len(time_ns)
    return round(float(time_ns[-1] - time_ns[0]) / 1e9 * n / (n - 1), 3) if n > 1 else 0.0


def scope_of(stage: str, actor: str, boot: str) -> Scope:
    """A stage of the schedule is counted for all; what an actor asked for itself, for that process alone."""
    return (stage, actor, boot) if stage.startswith(ADHOC) else (stage,)
