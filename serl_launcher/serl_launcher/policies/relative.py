"""Which of a policy's actions are relative to the state, and to which place in it.

    action relative to its anchor = action − state[anchor]      state: at the tick that the chunk was asked at
    of a pose = T(state[anchor])⁻¹ · T(action)                  policies.poses

A checkpoint says it (LeRobot's steps here, GR00T's parts in groot.parts), or `policy.relative` of the config for what
has no checkpoint yet. policies.normalise converts, policies.base carries the anchor from observation to chunk.
Everything else sees absolute actions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from serl_launcher.policies.checkpoint import POSTPROCESSOR, PREPROCESSOR, Checkpoint, CheckpointError
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("policy")
RELATIVE = ("relative_actions_processor", "delta_actions_processor")  # one step: its name of today and its former one
ABSOLUTE = ("absolute_actions_processor",)
UNMEASURED = (
    "policy.relative: the ranges of relative actions (low, high) come from a dataset: examples/train_sft.py measures "
    "them and its run knows them (checkpoint_path=), tools/preflight.py --dataset= prints them"
)
Anchors = tuple[int | None, ...]
"""One a dim of the action: the state dim that is subtracted, None where the action stays absolute."""


def by_place(names: Sequence[str], exclude: Sequence[str], dims: int) -> Anchors | None:
    """Anchors as LeRobot's `RelativeActionsProcessorStep` has them: dim k is relative to state dim k, unless its name
    contains one of the words in `exclude`, in any case. Dims beyond `names` are relative. None where nothing is."""
    words = [str(word).lower() for word in exclude if word]
    absolute = {k for k, name in enumerate(names[:dims]) if any(word in str(name).lower() for word in words)}
    return tuple(None if k in absolute else k for k in range(dims)) if len(absolute) < dims else None


def wanted_anchors(spec: TaskSpec, relative: Mapping[str, Any]) -> Anchors:
    """What `policy.relative` says of a task's actions: each is relative to the state that it is a target of, by
    `targets` or by its name, else to the one at its place. Raises ValueError naming the key."""
    unknown = sorted(set(relative) - {"exclude", "low", "high"})
    if unknown:
        raise ValueError(f"policy.relative: expected exclude, low and high, got {unknown[0]!r}")
    exclude, actions = [str(word) for word in relative.get("exclude") or []], list(spec.action_names)
    idle = [word for word in exclude if not any(word.lower() in name.lower() for name in actions)]
    if idle:
        raise ValueError(f"policy.relative.exclude: no action is called {idle[0]!r}: {actions}")
    placed = by_place(actions, exclude, len(actions))
    if placed is None:
        raise ValueError(f"policy.relative.exclude={exclude}: leaves no action; policy.relative=null says that")
    own = own_states(spec)
    anchors = tuple(None if k is None else own.get(k, k) for k in placed)
    if problem := misplaced(anchors, spec):
        raise ValueError(f"policy.relative: {problem}")
    return anchors


def check_measured(relative: Mapping[str, Any] | None) -> None:
    """Raise ValueError where nobody has measured the ranges of what `policy.relative` makes relative."""
    if relative is not None and not has_ranges(relative):
        raise ValueError(UNMEASURED)


def has_ranges(relative: Mapping[str, Any]) -> bool:
    """Does `policy.relative` know the ranges of what is relative?"""
    return relative.get("low") is not None and relative.get("high") is not None


def misplaced(anchors: Anchors, spec: TaskSpec) -> str | None:
    """What is wrong with subtracting these states from the task's actions, None when nothing is."""
    states, actions, own = list(spec.state_names), list(spec.action_names), own_states(spec)
    for k, anchor in enumerate(anchors):
        if anchor is None:
            continue
        if anchor >= len(states):
            return f"action {actions[k]!r} is relative to state dim {anchor}, the task has {len(states)} states"
        if own.get(k, anchor) != anchor:
            return (
                f"action {actions[k]!r} is relative to state dim {anchor} ({states[anchor]}), its own is dim {own[k]}"
            )
        if spec.targets and k not in own:
            return f"action {actions[k]!r} is relative to a state, but by task.spec.targets it is no position"
    return None


def own_states(spec: TaskSpec) -> dict[int, int]:
    """Place in the action -> place in the state that it commands, where the task says so or the names do."""
    # Hydra hands builders the fields of a spec, not its properties.
    states, actions = list(spec.state_names), list(spec.action_names)
    named = {k: states.index(name) for k, name in enumerate(actions) if name in states}
    return named | {actions.index(action): states.index(state) for action, state in spec.targets.items()}


def anchors_of_steps(
    checkpoint: Checkpoint, spec: TaskSpec, normalisers: tuple[str, ...], unnormalisers: tuple[str, ...]
) -> Anchors | None:
    """What a checkpoint's actions are relative to by LeRobot's generic processor steps; None where they are absolute.

    normalisers, unnormalisers: steps that the conversion must stand before, and behind. Raises CheckpointError where
    preprocessor, postprocessor and config.json do not say the same, or the task's actions are not what is meant.
    """
    before, early = _step(checkpoint, PREPROCESSOR, RELATIVE, normalisers)
    after, late = _step(checkpoint, POSTPROCESSOR, ABSOLUTE, unnormalisers)
    said = {PREPROCESSOR: bool(before.get("enabled")), POSTPROCESSOR: bool(after.get("enabled"))}
    if "use_relative_actions" in checkpoint.config:
        said["config.json"] = bool(checkpoint.config["use_relative_actions"])
    if len(set(said.values())) > 1:
        lines = (f"{'relative' if value else 'absolute'} in {file}" for file, value in said.items())
        raise CheckpointError(f"{checkpoint.folder}: actions are {', '.join(lines)}: which one?")
    if not said[PREPROCESSOR]:
        return None
    if early > 0 or late < 0:
        raise CheckpointError(f"{checkpoint.folder}: actions become relative after they are normalised; not supported")
    anchors = _by_names(checkpoint, spec, before)
    if anchors is not None and (problem := misplaced(anchors, spec)):
        raise CheckpointError(f"{checkpoint.folder}: {problem}")
    return anchors


def _by_names(checkpoint: Checkpoint, spec: TaskSpec, step: Mapping[str, Any]) -> Anchors | None:
    names, exclude, ours = step.get("action_names"), list(step.get("exclude_joints") or []), list(spec.action_names)
    if exclude and names is None:  # LeRobot's rule, too
        log.warning("%s: names no actions, so that none of %s stays absolute", checkpoint.folder, exclude)
    if names is not None and (len(names) != len(ours) or (set(names) == set(ours) and list(names) != ours)):
        raise CheckpointError(
            f"{checkpoint.folder}: its actions are {list(names)}, the task's {ours}: which of them are relative goes "
            "by their place"
        )
    return by_place(names or [], exclude, len(ours))


def _step(
    checkpoint: Checkpoint, file: str, names: tuple[str, ...], normalisers: tuple[str, ...]
) -> tuple[dict[str, Any], int]:
    """The configuration of a processor's step, {} where it has none, and how far behind the normaliser it stands."""
    path = checkpoint.folder / file
    steps = json.loads(path.read_text())["steps"] if path.is_file() else []
    order = [step.get("registry_name") for step in steps]
    place, normaliser = (
        next((k for k, name in enumerate(order) if name in wanted), None) for wanted in (names, normalisers)
    )
    if place is None:
        return {}, 0
    return steps[place].get("config") or {}, 0 if normaliser is None else place - normaliser
