"""The stages of a run, and which one is current: pure functions of what is journalled and what the trainer reported.

`schedule.stages` in yaml becomes a tuple of Stage; the gateway calls `current_stage` whenever a count changes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serl_config.nearest import nearest
from serl_transport.contract.bounds import INT32, INT64, check_name, check_whole

MODES = ("demo", "train", "eval", "online")
FIRST_EVAL_SEED = 1_000_000  # evaluation seeds start here; demonstrations and online episodes draw below
_KEYS = ("name", "mode", "episodes", "steps", "first_seed", "takeover")


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of `schedule.stages`."""

    name: str
    mode: str  # demo | train | eval | online
    episodes: int | None = None  # demo: successes; eval: distinct seeds; online: finished ones. None: no condition
    steps: int | None = None  # trainer steps within this stage. None: the trainer takes none
    first_seed: int = FIRST_EVAL_SEED  # eval only: seeds first_seed + i
    takeover: bool = True  # may the operator take over (never in eval)


@dataclass(frozen=True, slots=True)
class StageState:
    """Where a run stands."""

    index: int  # of the current stage; the last one when done; -1 for a schedule without stages
    stage: Stage | None
    episodes: int  # counted towards stage.episodes
    steps: int  # counted towards stage.steps
    min_version: int  # oldest policy version that may act in this stage; -1: none needed
    done: bool  # every stage is over

    def to_status(self) -> dict[str, Any]:
        """The `stage` part of the status document."""
        stage = self.stage
        return {
            "index": self.index,
            "name": stage.name if stage else "idle",
            "mode": stage.mode if stage else "idle",
            "steps_goal": stage.steps if stage else None,
            "episodes_goal": stage.episodes if stage else None,
            "steps": self.steps,
            "episodes": self.episodes,
            "min_version": self.min_version,
        }


def current_stage(
    stages: Sequence[Stage],
    episodes: Mapping[str, int],
    steps: Mapping[str, int],
    end_versions: Mapping[str, int],
    ended: Collection[str] = (),
) -> StageState:
    """The first stage with an unmet condition.

    episodes: stage name -> episodes that count; steps: stage name -> trainer steps; end_versions: stage name -> policy
    version at the end of its training; ended: stages that a person ended. A stage without conditions never ends.
    """
    if not stages:
        return StageState(-1, None, 0, 0, -1, False)
    over = [
        stage.name in ended or _is_over(stage, episodes.get(stage.name, 0), steps.get(stage.name, 0))
        for stage in stages
    ]
    done = all(over)
    index = len(stages) - 1 if done else over.index(False)
    stage = stages[index]
    counted, stepped = episodes.get(stage.name, 0), steps.get(stage.name, 0)
    return StageState(index, stage, counted, stepped, min_version(stages, index, end_versions), done)


def min_version(stages: Sequence[Stage], index: int, end_versions: Mapping[str, int]) -> int:
    """An evaluation asks for what the training before it ended with; online needs any policy, demonstrations none."""
    mode = stages[index].mode
    if mode != "eval":
        return 0 if mode == "online" else -1
    return max([end_versions.get(stage.name, 0) for stage in stages[:index]], default=0)


def _is_over(stage: Stage, episodes: int, steps: int) -> bool:
    if not stage.episodes and not stage.steps:
        return False
    return episodes >= (stage.episodes or 0) and steps >= (stage.steps or 0)


def read_stages(rows: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """`schedule.stages` of the config. ValueError names the key, what was expected and what came."""
    stages = tuple(_read_stage(f"schedule.stages.{k}", row) for k, row in enumerate(rows))
    names = [stage.name for stage in stages]
    for k, name in enumerate(names):
        if name in names[:k]:
            raise ValueError(f"schedule.stages.{k}.name: {name!r} is taken by stage {names.index(name)}")
    return stages


def _read_stage(where: str, row: Mapping[str, Any]) -> Stage:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected {{name, mode, …}}, got {row!r}")
    for key in row:
        if key not in _KEYS:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    name, mode = row.get("name"), row.get("mode")
    if check_name(f"{where}.name", name).startswith("adhoc_"):
        raise ValueError(f"{where}.name: expected a text that does not start with 'adhoc_', got {name!r}")
    if mode not in MODES:
        raise ValueError(f"{where}.mode: expected one of {', '.join(MODES)}, got {mode!r}")
    episodes, steps = _count(where, row, "episodes"), _count(where, row, "steps")
    first_seed = row.get("first_seed", FIRST_EVAL_SEED)
    if mode == "train" and (not steps or episodes):
        raise ValueError(f"{where}: a train stage names steps (and no episodes)")
    if mode == "eval" and not episodes:
        raise ValueError(f"{where}: an eval stage names episodes")
    check_whole(f"{where}.first_seed", first_seed, FIRST_EVAL_SEED, INT64 - INT32)  # seeds count up from it
    takeover = row.get("takeover", True)
    if not isinstance(takeover, bool):
        raise ValueError(f"{where}.takeover: expected true or false, got {takeover!r}")
    return Stage(name, mode, episodes, steps, first_seed, takeover and mode != "eval")


def _count(where: str, row: Mapping[str, Any], key: str) -> int | None:
    value = row.get(key)
    if value is None:
        return None
    return check_whole(f"{where}.{key}", value, 0, INT32) or None
