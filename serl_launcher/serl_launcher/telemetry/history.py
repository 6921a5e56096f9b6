"""What a run folder tells after (or during) a run: its episodes, its stages and its training steps.

Read by the summary and the learning curve. Only whole episodes count towards rates; an evaluation seed counts once.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from serl_launcher.replay.verdicts import newest
from serl_launcher.replay.verdicts import read as read_verdicts
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.config import read_config
from serl_launcher.run.data_record import data_of
from serl_launcher.run.files import read_json
from serl_launcher.run.in_force import NOBODYS
from serl_launcher.run.live_settings import in_force
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.metrics import read_metrics

AD_HOC = "adhoc_"  # how the names of the gateway's stages begin that actors asked for themselves
_OPTIONAL = ("whole", "seconds")  # keys of a line that earlier releases lack


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """One line of episodes.jsonl."""

    ordinal: int  # journal ordinal
    mode: str  # demo | online | eval
    stage: str  # name of its stage
    seed: int  # of the reset
    n_ticks: int  # length
    success: bool  # with or without help
    interventions: int  # ticks the operator drove
    whole: bool  # not cut: its outcome counts
    start_time: float  # unix s
    end_time: float  # unix s
    boot: str  # of the actor's process
    policy_version_last: int  # that acted
    seconds: float | None = None  # from the first tick to the end; None: an earlier release's line

    @property
    def autonomous(self) -> bool:
        """The policy did it alone."""
        return self.success and not self.interventions


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage that took place."""

    name: str  # as in the schedule, or adhoc_<mode> of what actors asked for themselves
    mode: str  # demo | train | eval | online
    episodes: tuple[EpisodeRecord, ...]  # whole ones; an evaluation holds each seed once, one that actors asked for
    # themselves, which may be made again and again, the newest: each seed once a process
    ticks: int  # of all its episodes
    steps: int  # trainer steps in it
    start_time: float  # unix s of its first sign of life
    end_time: float  # unix s of its last

    @property
    def successes(self) -> int:
        """Episodes that count as success: without help in online stages."""
        return sum(e.autonomous if self.mode == "online" else e.success for e in self.episodes)


@dataclass(frozen=True, slots=True)
class RunHistory:
    """Everything the summary draws from."""

    config: Mapping[str, Any]  # config.yaml
    status: Mapping[str, Any]  # status.json, or empty
    episodes: tuple[EpisodeRecord, ...]  # in journal order
    stages: tuple[StageRecord, ...]  # in their order, which no clock decides
    metrics: tuple[Mapping[str, Any], ...]  # rows of metrics/trainer.jsonl
    quarantined: int = 0  # episodes and items that the dataset goes on without
    accepted: int | None = None  # episodes that are imitated, by the newest verdicts; None: no trainer has judged any
    operators: Mapping[str, Any] = field(default_factory=dict)  # what people did to the run (run.acts)

    @property
    def start_time(self) -> float:
        """Unix s of the first sign of life; 0 when there was none."""
        return min((stage.start_time for stage in self.stages), default=0.0)

    @property
    def end_time(self) -> float:
        """Unix s of the last one."""
        return max((stage.end_time for stage in self.stages), default=0.0)


def read_history(run_dir: Path) -> RunHistory:
    """Read a run folder. ValueError when it holds no config.yaml or a line cannot be understood."""
    paths = RunPaths(run_dir)
    config = OmegaConf.to_container(read_config(paths.config))
    episodes = tuple(_read_episodes(paths.episodes))
    metrics = tuple(read_metrics(paths.metrics / "trainer.jsonl"))
    status, progress = read_json(paths.status) or {}, read_json(paths.stage_progress) or {}
    stages = _stages(config, episodes, metrics, progress.get("stage_steps") or {})
    verdicts = newest(read_verdicts(paths.acceptance))
    accepted = sum(verdicts.values()) if paths.acceptance.exists() else None
    quarantined = (read_json(run_dir / "dataset_status.json") or {}).get("quarantined", 0)
    operators = _operators(ActsLedger(run_dir), config, data_of(paths)["people"])
    return RunHistory(config, status, episodes, stages, metrics, quarantined, accepted, operators)


def _operators(ledger: ActsLedger, config: Mapping[str, Any], people: Mapping[str, Any]) -> dict[str, Any]:
    """Acts by kind, and what of them holds; people: in how many episodes who drove and judged."""
    state, live = ledger.state, in_force(config, ledger.state)
    return {
        "acts": dict(Counter(row["act"] for row in ledger.rows)),
        "by": sorted({row["by"] for row in ledger.rows if row["act"] not in NOBODYS and "by" in row}),
        "settings": {key: asdict(setting) for key, setting in live.settings.items()},
        "ended_stages": sorted(live.ended),
        "served": state.served,
        "episodes_judged": sum(word.success is not None or word.use is not None for word in state.words.values()),
        "people": people,
    }


def _read_episodes(path: Path) -> list[EpisodeRecord]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        try:
            row = json.loads(line)
            values = {name: row[name] for name in EpisodeRecord.__dataclass_fields__ if name not in _OPTIONAL}
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} line {number}: {error!r}") from None
        records.append(EpisodeRecord(**values, whole=row.get("whole", True), seconds=row.get("seconds")))
    return records


def _stages(
    config: Mapping[str, Any],
    episodes: Sequence[EpisodeRecord],
    metrics: Sequence[Mapping[str, Any]],
    steps: Mapping[str, int],
) -> tuple[StageRecord, ...]:
    modes = {stage["name"]: stage["mode"] for stage in (config.get("schedule") or {}).get("stages") or ()}
    modes |= {episode.stage: episode.mode for episode in episodes if episode.stage not in modes}
    records = [_stage(name, mode, episodes, metrics, steps.get(name, 0)) for name, mode in modes.items()]
    took_place = [record for record in records if record is not None]
    first = _first_ordinals(took_place, episodes)
    return tuple(sorted(took_place, key=lambda record: first[record.name]))  # stable: else in the schedule's order


def _first_ordinals(stages: Sequence[StageRecord], episodes: Sequence[EpisodeRecord]) -> dict[str, int]:
    """Stage -> journal ordinal of its first episode; one without episodes stands behind the one before it."""
    first = {episode.stage: episode.ordinal for episode in reversed(episodes)}
    before = -1
    for stage in stages:
        before = first.setdefault(stage.name, before)
    return first


def _trial(episode: EpisodeRecord) -> tuple[str, int]:
    """What of an evaluation counts once."""
    return (episode.boot if episode.stage.startswith(AD_HOC) else "", episode.seed)


def _newest_evaluation(episodes: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """From the version on with which the last process began that had a newer one than all before (gateway.ledger)."""
    newest = since = -1
    seen: set[str] = set()
    for episode in episodes:
        if episode.boot not in seen and episode.policy_version_last > newest:
            since = episode.policy_version_last
        seen.add(episode.boot)
        newest = max(newest, episode.policy_version_last)
    return [episode for episode in episodes if episode.policy_version_last >= since]


def _stage(
    name: str, mode: str, episodes: Sequence[EpisodeRecord], metrics: Sequence[Mapping[str, Any]], steps: int
) -> StageRecord | None:
    mine = [episode for episode in episodes if episode.stage == name]
    rows = [row for row in metrics if row.get("stage") == name]
    times = [t for e in mine for t in (e.start_time, e.end_time)] + [row["time"] for row in rows]
    if not times:
        return None
    counted = [episode for episode in mine if episode.whole]
    if mode == "eval":
        counted = _newest_evaluation(counted) if name.startswith(AD_HOC) else counted
        counted = list({_trial(episode): episode for episode in reversed(counted)}.values())[::-1]
    return StageRecord(name, mode, tuple(counted), sum(e.n_ticks for e in mine), steps, min(times), max(times))
