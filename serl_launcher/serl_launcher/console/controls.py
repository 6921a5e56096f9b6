"""What may be changed of the running training, as controls of the page: value, kind, range and unit of each key.

Called by `feed`: the run's config and what people changed of it in, plain rows out. The gateway decides about a change
(run.live_settings.check); a range here only spares a person a refusal.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from serl_launcher.run.in_force import InForce
from serl_launcher.run.live_settings import NUMBERS, STAGES, Range, in_force, keys, range_of, value_of
from serl_transport.contract.bounds import INT32, LARGEST_REWARD

# Of the rules and thresholds of replay.acceptance and replay.threshold; another class's keys go without a range.
FIELDS = {
    "min_return": Range(-LARGEST_REWARD, LARGEST_REWARD, "return"),
    "min_ticks": Range(0, INT32, "ticks", whole=True),
    "noop_threshold": Range(0.0, LARGEST_REWARD, "of the action's range"),
    "mask_before_takeover": Range(0, INT32, "ticks", whole=True, null="all of that stretch"),
    "autonomous_stride": Range(1, INT32, "ticks", whole=True),
    "start": Range(-LARGEST_REWARD, LARGEST_REWARD, "return"),
    "ceiling": Range(-LARGEST_REWARD, LARGEST_REWARD, "return"),
    "quantile": Range(0.0, 1.0, "of the last returns"),
    "window": Range(1, INT32, "episodes", whole=True),
}


def controls(config: Mapping[str, Any], state: InForce, stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per key that may change now: `{key, value, was, kind, low, high, unit, null, by, time}`.

    kind: number, whole, flag or text (JSON); stage: of the status document: goals of stages that are over are left out.
    """
    live = in_force(config, state)
    over = _over(live.config, stage)
    rows = []
    for key in keys(config):
        if key.startswith(f"{STAGES}.") and key.removeprefix(f"{STAGES}.").rpartition(".")[0] in over:
            continue
        value, setting = value_of(live.config, key), live.settings.get(key)
        said = {"by": setting.by, "time": setting.time} if setting else {}
        rows.append({"key": key, "value": value, "was": value_of(config, key), **_kind(config, key, value), **said})
    return rows


def _kind(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    name = key.rpartition(".")[2]
    if key in NUMBERS:
        known: Range | None = range_of(config, key)
    elif key.startswith(f"{STAGES}."):
        known = Range(1, INT32, name, whole=True)
    else:
        known = FIELDS.get(name)
    if isinstance(value, bool):
        return {"kind": "flag"}
    if known is not None and not isinstance(value, str | Mapping):
        told = asdict(known)
        return {"kind": "whole" if told.pop("whole") else "number", **told}
    return {"kind": "number" if isinstance(value, int | float) else "text"}


def _over(config: Mapping[str, Any], stage: Mapping[str, Any]) -> set[str]:
    """Names of the stages that are over."""
    names = [row["name"] for row in (config.get("schedule") or {}).get("stages") or ()]
    index = stage.get("index")
    return set(names[: max(0, index)] if isinstance(index, int) else ())
