"""Which keys of the config may change in a running training, and the config with what people changed.

    set {key, value} ─▶ check ─▶ acts.jsonl ─▶ in_force(config, acts) ─▶ gateway, trainer, reaccept, summary, start

A change holds as long as the config says what it said then: a start that types another value for the key has the last
word, and says so. `check` builds rules and thresholds, so that their own checks are the checks here; `in_force` builds
nothing. Torch-free.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serl_config.mistakes import is_config_mistake, mistake_message
from serl_config.nearest import nearest
from serl_launcher.run.in_force import InForce, Setting
from serl_launcher.run.schedule import Stage, read_stages
from serl_transport.contract.bounds import INT32, check_number, check_whole, shown

BUILT = ("algo.rule", "algo.threshold")  # sections whose plain keys may change; built from their _target_
STAGES = "schedule.stages"
GOALS = ("steps", "episodes")  # of a stage
ROLLOUT = "rollout."  # of the actors, who get it with their next ticket
AS_STARTED = "as each actor was started"


@dataclass(frozen=True, slots=True)
class Range:
    """What a number may be. unit: for people."""

    low: float
    high: float
    unit: str
    whole: bool = False
    null: str | None = None  # what null means, for people; None: it may not be

    def check(self, key: str, value: Any) -> None:
        """ValueError: another value."""
        if value is None and self.null is not None:
            return
        if self.whole:
            check_whole(key, value, int(self.low), int(self.high))
        else:
            check_number(key, value, self.low, self.high)


NUMBERS = {
    "algo.min_accepted": Range(0, INT32, "accepted episodes before online steps", whole=True),
    "trainer.max_steps_per_tick": Range(1e-6, 1e6, "online steps per new transition"),
    "trainer.online_lr_scale": Range(0.0, 1e3, "of the optimizer's lr"),
    "trainer.publish_period": Range(1, INT32, "steps", whole=True),
    "trainer.checkpoint_period": Range(1, INT32, "steps", whole=True),
    "trainer.rollback_margin": Range(0.0, 1.0, "of success", null="never"),
    "rollout.rate_hz": Range(1e-3, 1e4, "ticks per second, at most the task's control_hz", null=AS_STARTED),
    "rollout.video_every": Range(0, INT32, "episodes between two videos, 0: none", whole=True, null=AS_STARTED),
}


def keys(config: Mapping[str, Any]) -> list[str]:
    """Every key of this run that may change."""
    found = [key for key in NUMBERS if _select(config, key) is not _ABSENT]
    for section in BUILT:
        fields = _select(config, section)
        for name, value in fields.items() if isinstance(fields, Mapping) else ():
            if name not in ("_target_", "noop_dims") and not isinstance(value, list | tuple):  # no lists
                found.append(f"{section}.{name}")
    for row in _stage_rows(config):
        found += [f"{STAGES}.{row['name']}.{goal}" for goal in GOALS if row.get(goal)]
    return found


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """What the config says of a key that may change; ValueError for any other, with the nearest."""
    known = keys(config)
    if key not in known:
        raise ValueError(f"set: {shown(key)} cannot change in a running training{nearest(str(key), known, show=30)}")
    if key.startswith(f"{STAGES}."):
        name, _, goal = key.removeprefix(f"{STAGES}.").rpartition(".")
        return next(row[goal] for row in _stage_rows(config) if row["name"] == name)
    return _select(config, key)


def check(config: Mapping[str, Any], key: str, value: Any) -> None:
    """ValueError unless a start would take this value: what came, what was expected, and the key."""
    _check_value(config, key, value)
    if key.startswith(BUILT):
        _build(with_value(config, key, value), key)


def _check_value(config: Mapping[str, Any], key: str, value: Any) -> None:
    """All that can be said without building anything: the acts may be a stranger's."""
    was = value_of(config, key)
    if key in NUMBERS:
        range_of(config, key).check(key, value)
    elif key.startswith(f"{STAGES}."):
        if not value:
            raise ValueError(f"{key}: expected a whole number from 1, got {shown(value)}; end_stage ends the stage")
        read_stages(_stage_rows(with_value(config, key, value)))
    else:
        if not _is_plain(value):
            raise ValueError(f"{key}: expected a plain value, got {shown(value)}")
        if isinstance(value, bool) != isinstance(was, bool) and None not in (value, was):
            raise ValueError(f"{key}: expected {'true or false' if isinstance(was, bool) else 'no bool'}, got {value}")


def range_of(config: Mapping[str, Any], key: str) -> Range:
    """Of one of NUMBERS in this run."""
    hz = _select(config, "task.spec.control_hz")
    return replace(NUMBERS[key], high=hz) if key == "rollout.rate_hz" and hz is not _ABSENT else NUMBERS[key]


def of_actors(settings: Mapping[str, Setting]) -> dict[str, dict[str, Any]]:
    """What a ticket says of `rollout`: key -> {value, by}."""
    return {
        key.removeprefix(ROLLOUT): {"value": setting.value, "by": setting.by}
        for key, setting in settings.items()
        if key.startswith(ROLLOUT) and setting.value is not None
    }


def _is_plain(value: Any) -> bool:
    """A number, a word, null; or numbers by number, as a threshold's steps are. Nothing that could name a function."""
    if isinstance(value, Mapping):
        return all(str(n).isdigit() and isinstance(m, int | float) for n, m in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def with_value(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the config in which the key has this value."""
    changed = copy.deepcopy(dict(config))
    if key.startswith(f"{STAGES}."):
        name, _, goal = key.removeprefix(f"{STAGES}.").rpartition(".")
        next(row for row in changed["schedule"]["stages"] if row["name"] == name)[goal] = value
        return changed
    *path, last = key.split(".")
    node = changed
    for part in path:
        node = node[part]
    node[last] = value
    return changed


@dataclass(frozen=True, slots=True)
class LiveConfig:
    """A run's config with what people changed."""

    config: dict[str, Any]
    settings: dict[str, Setting]  # that hold
    passed_over: list[str]  # why others do not, for people
    ended: dict[str, int | None]  # stages that a person ended and that stay so -> version published of them

    @property
    def stages(self) -> tuple[Stage, ...]:
        """With the goals of now."""
        return read_stages(_stage_rows(self.config))


def in_force(config: Mapping[str, Any], state: InForce) -> LiveConfig:
    """The config (plain containers) with the changes that still hold."""
    now, holds, passed_over = dict(config), {}, []
    for key, setting in state.settings.items():
        if problem := _problem(config, now, key, setting):
            passed_over.append(problem)
            continue
        now, holds[key] = with_value(now, key, setting.value), setting
    goals = {row["name"]: goals_of(row) for row in _stage_rows(now)}
    ended = {
        name: stage.version
        for name, stage in state.ended.items()
        if goals.get(name) == dict(stage.goals) and (stage.version is not None or not stage.trains)
    }
    return LiveConfig(now, holds, passed_over, ended)


def goals_of(row: Mapping[str, Any]) -> dict[str, int | None]:
    """What ends a stage, of a row of `schedule.stages`."""
    return {goal: row.get(goal) or None for goal in GOALS}


def _problem(config: Mapping[str, Any], now: Mapping[str, Any], key: str, setting: Setting) -> str | None:
    told = f"{setting.by} set {key} to {setting.value!r} ({setting.time})"
    try:
        if (typed := value_of(config, key)) != setting.was:
            return f"{told}; it does not hold, the config says {typed!r} now and said {setting.was!r} then"
        _check_value(now, key, setting.value)
    except ValueError as mistake:
        return f"{told}; it does not hold: {mistake}"
    return None


def _build(config: Mapping[str, Any], key: str) -> None:
    """Build the section as a start would. ValueError in its own words."""
    from hydra.utils import instantiate  # half a second, for who sets something
    from omegaconf import OmegaConf

    section = next(section for section in BUILT if key.startswith(f"{section}."))
    try:
        instantiate(OmegaConf.create({"node": _select(config, section)}).node)
    except Exception as error:
        if not is_config_mistake(error):
            raise
        raise ValueError(f"{key}: {mistake_message(error)}") from None


_ABSENT = object()


def _select(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _stage_rows(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (config.get("schedule") or {}).get("stages") or ()
