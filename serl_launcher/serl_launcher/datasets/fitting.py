"""Does a dataset fit a task, and how do its columns become the task's? One answer for everything that takes a dataset.

    (Source's mapping, Columns, Table, TaskSpec) ─▶ fit ─▶ Fit: cameras, order of the dims; what is wrong; what to know

Dims are matched by name. A dataset that gives none is taken in its own order; one that names others is refused unless
the mapping lists its names in the task's order. Pictures of another size are resized, of another shape refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serl_config.nearest import nearest
from serl_launcher.datasets.columns import Columns
from serl_launcher.datasets.folder import DatasetError
from serl_launcher.datasets.source import Source
from serl_launcher.datasets.table import Table
from serl_transport.contract.specs import TaskSpec

FAR = {"state": 10.0, "action": 2.0}
"""Times the task's range beyond its ends: another unit. A limit may be narrower, a state's range is but a scale."""
NARROW = 0.03  # of the task's range: radians in a task of degrees use a fiftieth
SHAPE = 0.02  # by which the ratio of height and width may differ


@dataclass(frozen=True, slots=True)
class Fit:
    """How a dataset becomes a task's."""

    cameras: dict[str, str]  # the task's camera -> column
    state: list[int]  # the dataset's dims in the task's order
    action: list[int]
    problems: list[str]  # why it cannot; empty when it can
    notes: list[str]  # what to know of it


def fit(source: Source, columns: Columns, table: Table, fps: float, spec: TaskSpec) -> Fit:
    """Every camera and dim of the task, found or named as missing."""
    found = Fit({}, [], [], [], [])
    _fit_cameras(found, source, columns, spec)
    for what, wanted, theirs, ours in (
        ("state", source.state, columns.state_names, spec.state_names),
        ("action", source.action, columns.action_names, spec.action_names),
    ):
        dims = getattr(table, what).shape[1]
        getattr(found, what).extend(_order(found, what, wanted, theirs, list(ours), dims))
    if fps != max(1, round(spec.control_hz)):
        found.problems.append(
            f"fps: the dataset has {fps:g}, the task runs at {spec.control_hz:g}: chunks would be stretched"
        )
    if not found.problems:
        _check_units(found, table, spec)
    _check_prompts(found, source, table, spec)
    return found


def _fit_cameras(found: Fit, source: Source, columns: Columns, spec: TaskSpec) -> None:
    by_name = columns.cameras | {key: (key, size) for key, size in columns.cameras.values()}
    for camera in source.cameras:
        if camera not in spec.cameras:
            found.problems.append(f"cameras.{camera}: the task has no such camera; it has {list(spec.cameras)}")
    for camera, (height, width) in spec.cameras.items():
        name = source.cameras.get(camera, camera)
        if name not in by_name:
            found.problems.append(f"camera {camera!r}: the dataset has no {name!r}; it has {list(columns.cameras)}")
            continue
        found.cameras[camera], (h, w) = by_name[name]
        if abs(h / w - height / width) > SHAPE * height / width:
            found.problems.append(f"camera {camera!r}: {h}×{w} is of another shape than the task's {height}×{width}")
        elif (h, w) != (height, width):
            found.notes.append(f"camera {camera!r}: pictures are resized from {h}×{w} to {height}×{width}")


def _order(
    found: Fit, what: str, wanted: Sequence[str] | None, theirs: list[str] | None, ours: list[str], dims: int
) -> list[int]:
    names = theirs or [f"{what[0]}{k}" for k in range(dims)]  # as a task is called that was made of a nameless dataset
    if wanted is not None:
        missing = [name for name in wanted if name not in names]
        if missing or len(wanted) != len(ours):
            more = f"no dim {missing[0]!r}{nearest(missing[0], names)}" if missing else f"{len(wanted)} names"
            found.problems.append(f"{what}: {more}; expected {len(ours)} of {names}, in the order of {ours}")
            return []
        return [names.index(name) for name in wanted]
    if set(ours) <= set(names):
        if len(ours) < dims:
            left_out = [name for name in names if name not in ours]
            found.notes.append(f"{what}: the task leaves out {left_out}")
        return [names.index(name) for name in ours]
    if dims != len(ours):
        found.problems.append(f"{what}: {dims} dims {names}, the task has {len(ours)}: {ours}")
    elif theirs is None or ours == [f"{what[0]}{k}" for k in range(dims)]:
        found.notes.append(f"{what}: {'the dataset' if theirs is None else 'the task'} names no dims: taken in order")
        return list(range(dims))
    else:
        found.problems.append(
            f"{what}: the dataset's dims are {names}, the task's {ours}: if they mean the same, list the dataset's in "
            f"the task's order, {what}: [{', '.join(names)}]"
        )
    return []


def _check_units(found: Fit, table: Table, spec: TaskSpec) -> None:
    for what, order, names, low, high in (
        ("state", found.state, spec.state_names, spec.state_low, spec.state_high),
        ("action", found.action, spec.action_names, spec.action_low, spec.action_high),
    ):
        values, low, high = getattr(table, what)[:, order], np.array(low), np.array(high)
        bounded = np.isfinite(low) & np.isfinite(high)
        width = np.where(bounded, high - low, 1.0)
        beyond = np.where(bounded, np.maximum(values - high, low - values) / width, -1.0)
        if (worst := beyond.max()) > 1e-6:
            row, dim = np.unravel_index(beyond.argmax(), beyond.shape)
            episode = next(e for e in table.episodes if row < e.end)
            text = (
                f"{what} dim {names[dim]!r}: {values[row, dim]:g} in episode {episode.index}, frame "
                f"{row - episode.first}, lies outside the task's {low[dim]:g} to {high[dim]:g}"
            )
            if worst > FAR[what]:
                found.problems.append(f"{text}: other units, or changes in place of targets?")
            else:
                found.notes.append(f"{text} ({int((beyond > 1e-6).any(1).sum())} rows do)")
        used = np.abs(values).max(0)[bounded] / np.maximum(np.abs(low), np.abs(high))[bounded]
        if used.size and used.max() < NARROW:
            found.notes.append(f"{what}: no value uses more than {used.max():.1%} of the task's range: other units?")
    _check_targets(found, table, spec)


def _check_targets(found: Fit, table: Table, spec: TaskSpec) -> None:
    """Absolute targets lie near the pose, changes near zero."""
    same = {k: spec.state_names.index(n) for k, n in enumerate(spec.action_names) if n in spec.state_names}
    places = spec.target_dims or (same if len(same) == len(spec.action_names) else {})
    if not places:
        return
    pose = table.state[:, [found.state[place] for place in places.values()]]
    action = table.action[:, [found.action[place] for place in places]]
    from_pose, from_zero = np.square(action - pose).mean(), np.square(action).mean()
    if from_pose > 4 * from_zero:
        found.problems.append(
            "action: the task's are target positions of its state dims, the recorded ones lie at 0 rather than at "
            f"the pose (rms {np.sqrt(from_zero):.3g} and {np.sqrt(from_pose):.3g}): changes, not targets?"
        )


def _check_prompts(found: Fit, source: Source, table: Table, spec: TaskSpec) -> None:
    used = [table.prompts[place] for place in np.unique(table.prompt)]
    if source.prompt is not None:
        return
    if any(not text for text in used):
        found.problems.append("prompt: the dataset holds an empty task text; give one with prompt:")
    elif spec.prompt not in used:
        found.notes.append(f"prompt: the task says {spec.prompt!r}, the dataset {used[:3]}")


def refuse(found: Fit, where: str) -> None:
    """Raise DatasetError of the first problem, with the number of others."""
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise DatasetError(f"{where}: {found.problems[0]}{more}")
