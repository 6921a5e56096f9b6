"""Why a policy that looks right does not move the robot: what recorded rows say against task and units, one check each.

tools/why.py prints what `symptoms` finds. Pure functions of a `Recording` and the task: no file is read, nothing is
built. Each finding says what is wrong, the evidence in figures, and the key or file to change. Thresholds are wide on
purpose: a clean set of demonstrations raises none of them (benchmarks/seeded_mistakes.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from serl_transport.contract.specs import TaskSpec

IDLE = 1 / 3  # share of ticks without any motion that a set of demonstrations does not have
STILL = 0.002  # of a dim's range: less is no motion
SAME = 1e-5  # of a dim's range: a copy
FEW = 20  # ticks, too few to judge


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    what: str
    evidence: str
    change: str  # the key, file or act that mends it

    def __str__(self) -> str:
        return f"{self.what}: {self.evidence}; change: {self.change}"


@dataclass(frozen=True, slots=True)
class Recording:
    """A dataset's rows in order; a picture is seen at some ticks only."""

    state: np.ndarray  # float32[n, s], physical
    action: np.ndarray  # float32[n, ad], physical
    episode: np.ndarray  # int[n], index of the episode
    fps: float
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)  # camera -> uint8[episodes, looks, h, w, 3]
    time_ns: np.ndarray | None = None  # int64[n], when each was captured

    def part(self, which: np.ndarray) -> "Recording":
        """Some of the rows, bool[n]; the pictures stay."""
        time_ns = None if self.time_ns is None else self.time_ns[which]
        return Recording(self.state[which], self.action[which], self.episode[which], self.fps, self.pictures, time_ns)

    @property
    def inner(self) -> np.ndarray:
        """bool[n − 1]: is the next row of the same episode?"""
        return self.episode[1:] == self.episode[:-1]


@dataclass(frozen=True, slots=True)
class Meaning:
    """How the task says that its actions are meant."""

    pairs: Mapping[int, int]  # action dim -> the state dim that it commands
    targets: frozenset[int]  # action dims that are positions
    rates: frozenset[int]  # action dims that are displacements

    @classmethod
    def of(cls, spec: TaskSpec, moves: Sequence[int] | None) -> "Meaning":
        """moves: task.noop_dims. A position is what the spec's targets name, and an action of a state's name; one of
        the name with d, delta_ or v before it is its displacement."""
        names, states = list(spec.action_names), list(spec.state_names)
        pairs = {k: states.index(n) for k, n in enumerate(names) if n in states}
        pairs |= spec.target_dims
        absolute = frozenset(pairs)
        for k, name in enumerate(names):
            for prefix in ("delta_", "d", "v"):
                if k not in pairs and name.startswith(prefix) and name.removeprefix(prefix) in states:
                    pairs[k] = states.index(name.removeprefix(prefix))
        rates = frozenset(k for k in pairs if k not in absolute) | (frozenset(moves or ()) - absolute)
        return cls(pairs, absolute, rates)


def symptoms(rows: Recording, spec: TaskSpec, meaning: Meaning, max_speed: Mapping[str, float] | None) -> list[Finding]:
    """Every finding of the rows against the task. `max_speed`: task.safety.max_speed."""
    found = list(not_finite(rows, spec))
    if found or rows.inner.sum() < FEW:
        return found
    span = _span(rows.state)
    moved = np.abs(np.diff(rows.state, axis=0)) > STILL * span
    return [
        *idle(rows, moved),
        *stale_states(rows, span),
        *lags(rows, spec, meaning, span),
        *kinds(rows, spec, meaning, span),
        *signs(rows, spec, meaning),
        *orders(rows, spec, meaning),
        *scales(rows, spec, meaning, span),
        *limits(rows, spec),
        *speeds(rows, spec, meaning, max_speed or {}),
        *late_ticks(rows),
        *cameras(rows),
    ]


def not_finite(rows: Recording, spec: TaskSpec) -> Iterator[Finding]:
    """NaN and Inf: one of them ends a training."""
    for what, values, names in (("state", rows.state, spec.state_names), ("action", rows.action, spec.action_names)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            at, k = bad[0]
            yield Finding(
                "values that are no numbers",
                f"{what} {names[k]!r} is {values[at, k]} at row {at}, episode {rows.episode[at]} ({len(bad)} in all)",
                "leave the episode out or record it anew",
            )


def idle(rows: Recording, moved: np.ndarray) -> Iterator[Finding]:
    """Ticks at which nothing moves: a policy that imitates them stands still."""
    still = ~moved.any(1) & rows.inner
    share = still.sum() / rows.inner.sum()
    if share > IDLE:
        leading = [int(np.argmin(still[rows.episode[:-1] == e])) for e in np.unique(rows.episode)]
        yield Finding(
            "idle frames",
            f"nothing moves in {share:.0%} of the ticks, at an episode's start {np.median(leading):.0f} (median)",
            "cut the pauses out of the dataset, or algo.rule.noop_threshold in a run, which drops them at the start",
        )


def stale_states(rows: Recording, span: np.ndarray) -> Iterator[Finding]:
    """A state that stays to the bit while the action goes on: sensed less often than it is recorded."""
    acts = (np.abs(np.diff(rows.action, axis=0)) > STILL * _span(rows.action)).any(1) & rows.inner
    kept = (rows.state[1:] == rows.state[:-1]).all(1)
    share = (kept & acts).sum() / max(1, acts.sum())
    if span.max() > 0 and acts.sum() > FEW and share > 0.4:
        yield Finding(
            "stale observations",
            f"the state is the one before, to the bit, in {share:.0%} of the ticks at which the action changed",
            f"the driver: read the state at each tick ({rows.fps:g} Hz), or lower task.spec.control_hz",
        )


def lags(rows: Recording, spec: TaskSpec, meaning: Meaning, span: np.ndarray) -> Iterator[Finding]:
    """A target leads the state. One that equals the state of its own tick, or of one before, says "stay"."""
    dims = [k for k in sorted(meaning.targets) if span[meaning.pairs[k]] > 0]
    if not dims:
        return
    states = [meaning.pairs[k] for k in dims]
    error = {lag: _error_at(rows, dims, states, lag) / span[states] for lag in (-2, -1, 0, 1)}
    for lag, told in ((0, "the state of its own tick"), (-1, "the state a tick ago"), (-2, "the state two ticks ago")):
        copied = [spec.action_names[k] for k, e in zip(dims, error[lag], strict=True) if e < SAME]
        if len(copied) > len(dims) / 2:
            yield Finding(
                "state equal to action",
                f"{', '.join(copied[:6])}: the action is {told}, so that to imitate it is to stay",
                "record the action that was sent (leader, teleoperator, next state), not the state",
            )
            return
    behind = np.minimum(error[-1], error[-2])
    if (behind < 0.5 * np.minimum(error[0], error[1])).sum() > len(dims) / 2:
        yield Finding(
            "actions behind the state",
            f"actions fit the state a tick or two before ({behind.mean():.1%} of the range) better than the one after "
            f"({error[1].mean():.1%})",
            "shift the action column forward: row t holds what was sent after observation t",
        )


def kinds(rows: Recording, spec: TaskSpec, meaning: Meaning, span: np.ndarray) -> Iterator[Finding]:
    """Displacements where the task says positions, and positions where it says displacements."""
    after, before, action = rows.state[1:][rows.inner], rows.state[:-1][rows.inner], rows.action[:-1][rows.inner]
    wrong: dict[str, list[str]] = {"deltas": [], "positions": []}
    for k, j in meaning.pairs.items():
        if span[j] == 0 or np.ptp(action[:, k]) == 0:
            continue
        level, step = _corr(action[:, k], after[:, j]), _corr(action[:, k], after[:, j] - before[:, j])
        gap = np.abs(action[:, k] - after[:, j]).mean() / span[j]
        if k in meaning.targets and step > 0.6 and step > level + 0.2 and np.abs(action[:, k]).max() < 0.5 * span[j]:
            wrong["deltas"].append(spec.action_names[k])
        if k in meaning.rates and level > 0.9 and level > step + 0.2 and gap < 0.1:
            wrong["positions"].append(spec.action_names[k])
    if wrong["deltas"]:
        yield Finding(
            "deltas where positions are meant",
            f"{', '.join(wrong['deltas'][:6])}: recorded actions follow the state's change, not the state",
            "name them apart from the states (d<name>) and take them out of task.spec.targets, or record targets",
        )
    if wrong["positions"]:
        yield Finding(
            "positions where deltas are meant",
            f"{', '.join(wrong['positions'][:6])}: recorded actions are the next state, not its change",
            "task.spec.targets (and the action's name), or record displacements",
        )


def signs(rows: Recording, spec: TaskSpec, meaning: Meaning) -> Iterator[Finding]:
    """An action that drives its state the other way, in all episodes or in some."""
    for k, j in sorted(meaning.pairs.items()):
        each = [_effect(rows, k, j, k in meaning.targets, rows.episode == e) for e in np.unique(rows.episode)]
        clear = [c for c in each if abs(c) > 0.5]
        against = sum(c < 0 for c in clear)
        if len(clear) < max(2, len(each) / 2) or not against:
            continue
        name = spec.action_names[k]
        if against == len(clear):
            told = f"{name!r} moves {spec.state_names[j]!r} the other way (correlation {np.mean(clear):.2f})"
            yield Finding("sign", told, f"the sign of {name!r} in the driver or the dataset")
        elif min(against, len(clear) - against) >= max(1, 0.1 * len(clear)):
            told = f"{name!r} moves {spec.state_names[j]!r} the other way in {against} of {len(clear)} episodes"
            yield Finding("sign differs between episodes", told, "one convention for all recordings")


def orders(rows: Recording, spec: TaskSpec, meaning: Meaning) -> Iterator[Finding]:
    """Targets that follow another state than their own: joints in another order."""
    dims = sorted(meaning.targets)
    if len(dims) < 2:
        return
    after, action = rows.state[1:][rows.inner], rows.action[:-1][rows.inner]
    gap = np.array([[np.abs(action[:, k] - after[:, meaning.pairs[m]]).mean() for m in dims] for k in dims])
    best, own = gap.argmin(1), gap.diagonal()
    swapped = [n for n in range(len(dims)) if best[n] != n and gap[n].min() < 0.2 * own[n]]
    if len(swapped) >= 2:
        told = ", ".join(
            f"{spec.action_names[dims[n]]!r} follows {spec.state_names[meaning.pairs[dims[best[n]]]]!r}"
            for n in swapped[:4]
        )
        yield Finding("order of the dims", told, "task.spec.action_names and state_names in the order of the columns")


def scales(rows: Recording, spec: TaskSpec, meaning: Meaning, span: np.ndarray) -> Iterator[Finding]:
    """Targets in another unit than the state that they command."""
    commanded = _span(rows.action)
    for k in sorted(meaning.targets):
        j = meaning.pairs[k]
        if min(commanded[k], span[j]) > 0 and not 0.1 < commanded[k] / span[j] < 10:
            told = f"{spec.action_names[k]!r} covers {commanded[k]:.4g}, the state that it commands {span[j]:.4g}"
            yield Finding("scale", told, "one unit for state and action (a gripper of 0 to 1 or of 0 to 100)")


def limits(rows: Recording, spec: TaskSpec) -> Iterator[Finding]:
    """Recorded actions beyond the task's limits are cut off by safety and policy; far within them they are nothing."""
    low, high = np.array(spec.action_low), np.array(spec.action_high)
    slack = 0.01 * (high - low)
    outside = ((rows.action < low - slack) | (rows.action > high + slack)).mean(0)
    for k in np.flatnonzero(outside > 0.005):
        seen = rows.action[:, k]
        yield Finding(
            "clipped actions",
            f"{spec.action_names[k]!r}: {outside[k]:.0%} of the recorded ones ({seen.min():g} to {seen.max():g}) are "
            f"outside {low[k]:g} to {high[k]:g}",
            "task.spec.action_low and action_high, or the unit or scale of the recording",
        )
    finite = np.isfinite(spec.state_low) & np.isfinite(spec.state_high)
    for j in np.flatnonzero(finite):
        seen, width = rows.state[:, j], spec.state_high[j] - spec.state_low[j]
        beyond = ((seen < spec.state_low[j] - width) | (seen > spec.state_high[j] + width)).mean()
        if beyond > 0.05:
            yield Finding(
                "state beyond the task's range",
                f"{spec.state_names[j]!r}: {seen.min():g} to {seen.max():g}, the task says {spec.state_low[j]:g} to "
                f"{spec.state_high[j]:g}",
                "task.spec.state_low and state_high, or the unit (degrees, radians, metres, millimetres)",
            )


def speeds(rows: Recording, spec: TaskSpec, meaning: Meaning, max_speed: Mapping[str, float]) -> Iterator[Finding]:
    """Demonstrations faster than safety lets the policy be."""
    for name, limit in max_speed.items():
        if name not in spec.action_names:
            continue
        k = spec.action_names.index(name)
        target = k in meaning.targets
        step = np.diff(rows.action[:, k])[rows.inner] if target else rows.action[:, k]
        share = (np.abs(step) * spec.control_hz > 1.05 * limit).mean()
        if share > 0.05:
            fastest = np.abs(step).max() * spec.control_hz
            told = f"{name!r}: {share:.0%} of the recorded ticks are faster than {limit:g}/s (up to {fastest:.3g})"
            yield Finding("clipped actions", told, f"task.safety.max_speed.{name}, or record more slowly")


def late_ticks(rows: Recording) -> Iterator[Finding]:
    """Ticks that took longer than the rate that the dataset names."""
    if rows.time_ns is None:
        return
    period = np.median(np.diff(rows.time_ns)[rows.inner]) / 1e9
    if period * rows.fps > 1.5:
        told = f"a tick took {period * 1e3:.0f} ms (median), at {rows.fps:g} Hz it is {1e3 / rows.fps:.0f} ms"
        yield Finding("ticks late", told, "task.spec.control_hz, or what slows the actor down (cameras, rollout.video)")


def cameras(rows: Recording) -> Iterator[Finding]:
    """Pictures without content, that do not change, that are another camera's."""
    for camera, seen in rows.pictures.items():
        flat = np.array([looks.std() < 1 for looks in seen])
        if flat.mean() > 0.2:
            told = f"{camera!r} is of one colour in {flat.sum()} of {len(seen)} episodes"
            yield Finding("black camera", told, "the camera, its exposure or its index")
            continue
        same = np.array([len(looks) > 2 and (looks == looks[:1]).all() for looks in seen])
        if same.mean() > 0.2:
            told = f"{camera!r} shows one picture from start to end in {same.sum()} of {len(seen)} episodes"
            yield Finding("frozen camera", told, "the camera's driver; task.env.frozen_s ends such an episode")
    names = list(rows.pictures)
    for n, one in enumerate(names):
        for other in names[n + 1 :]:
            yield from _exchanged(one, other, rows.pictures[one], rows.pictures[other])


def _exchanged(one: str, other: str, a: np.ndarray, b: np.ndarray) -> Iterator[Finding]:
    if a.shape == b.shape and (a == b).all():
        yield Finding("camera order", f"{one!r} and {other!r} are the same picture", "which camera each name opens")
        return
    a, b = (_coarse(x.mean(1)) for x in (a, b))  # an episode's mean look, [episodes, 8, 8, 3]
    if len(a) < 3 or np.abs(a.mean(0) - b.mean(0)).mean() < 2:
        return
    swapped = []
    for e in range(len(a)):
        others = [i for i in range(len(a)) if i != e]
        straight = np.abs(a[e] - np.median(a[others], 0)).mean() + np.abs(b[e] - np.median(b[others], 0)).mean()
        crossed = np.abs(a[e] - np.median(b[others], 0)).mean() + np.abs(b[e] - np.median(a[others], 0)).mean()
        if crossed < 0.5 * straight:
            swapped.append(e)
    if swapped:
        told = f"{one!r} and {other!r} are exchanged in {len(swapped)} of {len(a)} episodes ({swapped[:5]})"
        yield Finding("camera swap", told, "the cameras' indices (fix them by serial number), or these episodes")


def _coarse(images: np.ndarray) -> np.ndarray:
    """float[n, 8, 8, 3] of float[n, h, w, 3]."""
    _, h, w, _ = images.shape
    return np.stack([[block.mean((1, 2)) for block in np.array_split(band, min(8, w), 2)]
                     for band in np.array_split(images, min(8, h), 1)]).transpose(2, 0, 1, 3)  # fmt: skip


def _span(values: np.ndarray) -> np.ndarray:
    """float[d]: what each dim covers, without its outermost hundredths."""
    low, high = np.percentile(values, (1, 99), axis=0)
    return (high - low).astype(np.float64)


def _corr(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _effect(rows: Recording, k: int, j: int, target: bool, part: np.ndarray) -> float:
    """Correlation of an action with what its state does, within one episode."""
    here = part[1:] & part[:-1]
    after, before, action = rows.state[1:, j][here], rows.state[:-1, j][here], rows.action[:-1, k][here]
    return _corr(action, after if target else after - before) if here.sum() > 5 else 0.0


def _error_at(rows: Recording, dims: Sequence[int], states: Sequence[int], lag: int) -> np.ndarray:
    """float[dims]: mean |action[t] − state[t + lag]| within episodes."""
    n, shift = len(rows.state), abs(lag)
    first, second = (slice(0, n - shift), slice(shift, n)) if lag >= 0 else (slice(shift, n), slice(0, n - shift))
    same = rows.episode[first] == rows.episode[second]
    return np.abs(rows.action[first][:, dims] - rows.state[second][:, states])[same].mean(0)
