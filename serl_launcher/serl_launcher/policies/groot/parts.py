"""GR00T's parts of state and action: which are relative to the state, by which statistics, and how they are said.

groot.assets reads them from a checkpoint, groot.saving writes them. Facts from NVIDIA's StateActionProcessor and
LeRobot's processor: a part is relative where its `rep` says so and the processor uses relative actions; it is then
normalised by the least and the largest of `relative_action`, a row each tick of a chunk, whatever serves the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from serl_launcher.policies import poses
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.relative import Anchors

LANGUAGE = "annotation.human.task_description"
Ranges = tuple[np.ndarray, np.ndarray]  # lowest and highest, float64[ticks, dims] each


@dataclass(frozen=True, slots=True)
class Part:
    """A run of dims under one name."""

    name: str
    first: int
    end: int
    state: str | None = None  # part of the state that an action is relative to


def relative_keys(modality: Mapping[str, Any], used: bool) -> dict[str, Mapping[str, Any]]:
    """Action part -> its configuration, of those that are relative; used: the processor's `use_relative_action`."""
    action = modality.get("action", {})
    configs = zip(action.get("modality_keys") or [], action.get("action_configs") or [], strict=False)
    return {key: config for key, config in configs if used and _said(config, "rep") == "relative"}


def part_anchors(
    where: object, modality: Mapping[str, Any], statistics: Mapping[str, Any], relative: Mapping[str, Any]
) -> tuple[Anchors | None, tuple[int, ...]]:
    """The state dim that each action dim is relative to, None where `relative` of `relative_keys` is empty; and the
    first dims of what is relative as a pose. Raises CheckpointError naming a part that cannot be.
    """
    if not relative:
        return None, ()
    places, first = {}, 0
    for key in modality["state"]["modality_keys"]:
        places[key] = range(first, first := first + _width(statistics["state"][key]))
    anchors: list[int | None] = []
    as_pose: list[int] = []
    for key in modality["action"]["modality_keys"]:
        width = _width(statistics["action"][key])
        if key not in relative:
            anchors += [None] * width
            continue
        kind, state = _said(relative[key], "type"), relative[key].get("state_key") or key
        if kind != "non_eef":
            form = _said(relative[key], "format").replace("xyz_", "xyz+")
            if (kind, form, width) != ("eef", poses.FORMAT, poses.WIDTH):
                raise CheckpointError(
                    f"{where}: action part {key!r} is relative as a pose ({kind}, {form}, {width} dims); only eef, "
                    f"{poses.FORMAT}, of {poses.WIDTH} is read"
                )
            as_pose.append(len(anchors))
        if len(places.get(state, ())) != width:
            got = f"{len(places[state])} dims" if state in places else f"not among {list(places)}"
            raise CheckpointError(f"{where}: action part {key!r} of {width} dims is relative to state {state!r}: {got}")
        anchors += places[state]
    return tuple(anchors), tuple(as_pose)


def relative_range(where: object, statistics: Mapping[str, Any], key: str) -> Ranges:
    """Ranges of a relative action part. Raises CheckpointError where only absolute ones are there."""
    found = statistics.get("relative_action", {}).get(key, {})
    if not {"min", "max"} <= set(found):
        raise CheckpointError(
            f"{where}: action part {key!r} is relative, and there are no statistics of relative actions of it (min and "
            "max in relative_action), only of absolute ones"
        )
    low, high = (np.atleast_2d(np.asarray(found[end], np.float64)) for end in ("min", "max"))
    return low, high


def modality_of(
    cameras: list[str], states: Sequence[str], actions: Sequence[Part | str], ticks: list[int]
) -> dict[str, Any]:
    """What NVIDIA's layout says of an embodiment's parts; ticks: that were trained, empty: all."""
    parts = [part if isinstance(part, Part) else Part(part, 0, 0) for part in actions]
    keys = {"video": cameras, "state": list(states), "action": [part.name for part in parts], "language": [LANGUAGE]}
    modality = {what: {"modality_keys": names, "delta_indices": [0]} for what, names in keys.items()}
    modality["action"] |= {"delta_indices": ticks, "action_configs": [_config_of(part) for part in parts]}
    return modality


def split(anchors: Anchors | None, states: int, actions: int) -> tuple[list[Part], list[Part]]:
    """State and action as parts that say these anchors: one each, `all`, where nothing is relative."""
    if anchors is None:
        return [Part("all", 0, states)], [Part("all", 0, actions)]
    cuts = [k for k in range(1, actions) if not _go_on(anchors[k - 1], anchors[k])]
    runs = list(zip([0, *cuts], [*cuts, actions], strict=True))
    ends = {0, states}
    for first, end in runs:
        if anchors[first] is not None:
            ends |= {anchors[first], anchors[first] + end - first}
    edges = sorted(ends)
    state = [Part(f"state_{k}", *edge) for k, edge in enumerate(pairwise(edges))]
    of = {(part.first, part.end): part.name for part in state}
    spans = [None if anchors[a] is None else (anchors[a], anchors[a] + b - a) for a, b in runs]
    if not set(spans) <= {None, *of}:
        raise ValueError(f"policy.relative: several actions are relative to one state, by {anchors}: no parts say that")
    places = [None if span is None else of[span] for span in spans]
    return state, [Part(f"action_{k}", *run, place) for k, (run, place) in enumerate(zip(runs, places, strict=True))]


def laid(statistics: Mapping[str, Any]) -> list[Part]:
    """The parts of one quantity, one behind the other."""
    parts, first = [], 0
    for name, values in statistics.items():
        parts.append(Part(name, first, first := first + _width(values)))
    return parts


def anchored(part: Part, anchors: Anchors, states: Sequence[Part]) -> Part:
    """An action part with the state part that it is relative to. ValueError where only some of its dims are, or no part
    of the state has just those dims."""
    own = anchors[part.first : part.end]
    if own == (None,) * len(own):
        return part
    for state in states:
        if own == tuple(range(state.first, state.end)):
            return replace(part, state=state.name)
    said = [f"{state.name} {state.first} to {state.end - 1}" for state in states]
    raise ValueError(
        f"policy.relative: action part {part.name!r} of modality.json would be relative to state dims {list(own)} "
        f"(none: absolute), which is no part of the state: {said}; give "
        "what stays absolute a part of its own"
    )


def _go_on(before: int | None, here: int | None) -> bool:
    return before is here is None or (None not in (before, here) and here == before + 1)


def _config_of(part: Part) -> dict[str, Any]:
    config = {"rep": "absolute" if part.state is None else "relative", "type": "non_eef", "format": "default"}
    return config if part.state in (None, part.name) else config | {"state_key": part.state}


def _said(config: Mapping[str, Any], key: str) -> str:
    """A word of an action's configuration; NVIDIA writes names of enumerations in capitals."""
    return str(config.get(key, "")).rpartition(".")[2].lower()


def _width(statistics: Mapping[str, Any]) -> int:
    return np.atleast_1d(next(iter(statistics[name] for name in ("min", "q01", "mean") if name in statistics))).shape[
        -1
    ]
