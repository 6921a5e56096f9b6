"""Which episodes, and which of their ticks, the policy imitates: the rejection in rejection sampling.

The trainer's view (replay.views) calls a rule once per finished episode; config/rule/ names them and holds their values
(`rule=`, `algo.rule.<field>=`). A rule is a pure function of the episode, so that it can be changed afterwards and the
views rebuilt. Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAUSES = ("keep", "no_start", "drop")


@dataclass(frozen=True, slots=True)
class EpisodeColumns:
    """One finished episode as a rule sees it: n ticks."""

    mode: str  # demo or online
    success: bool
    reward: np.ndarray  # float32[n]
    action: np.ndarray  # float32[n, ad], executed, in the model's units ([-1, 1] over the action range)
    intervention: np.ndarray  # bool[n]
    threshold: float | None = None  # m of a schedule (replay.threshold); None: the rule's own
    targets: Sequence[int] = ()  # action dimensions that are target positions (task.spec.targets)

    def __len__(self) -> int:
        return len(self.reward)


@dataclass(frozen=True, slots=True)
class Selection:
    """A rule's verdict."""

    accepted: bool
    reason: str  # one word for the ledger
    starts: np.ndarray  # bool[n], ticks at which a training chunk may begin
    labels: np.ndarray  # bool[n], ticks whose executed action is a label; the others are masked out of the loss

    @classmethod
    def rejected(cls, n: int, reason: str) -> "Selection":
        return cls(False, reason, np.zeros(n, bool), np.zeros(n, bool))


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessRule:
    """Accept a success whose return reaches m (Hi-ORS, arXiv 2510.26406): autonomous and operator ticks alike.

    The paper's rule is return ≥ m alone (`require_success=False`): with rewards for stages a failure may reach m, too.

    What the policy did just before the operator took over is what the operator had to correct: those ticks are neither
    labels nor starts. Storing them stopped the improvement on the default task (docs/LOG.md).
    """

    min_return: float  # m, least return of an episode; a schedule of m (`algo.threshold`) takes its place
    discount: float  # γ a tick of that return; below 1 a quick success is worth more than a slow one
    require_success: bool  # is a failure rejected whatever its return?
    min_ticks: int  # shorter episodes are dropped
    noop_threshold: float  # share of the action range: ticks that move less are dropped, see `idle_starts`
    noop_dims: Sequence[int] | None  # action dimensions that move the robot; null: all
    pauses: str  # ticks without motion in mid-episode, see `still_ticks`: keep; no_start, no chunk begins there; drop
    mask_before_takeover: int | None  # policy ticks hidden before a takeover; null: the whole stretch
    autonomous_stride: int  # mixed rate: chunks begin at every k-th tick that the policy drove, at each of a person

    def __post_init__(self) -> None:
        _check_numbers(self, "min_return", "discount", "noop_threshold")
        _check_pauses(self.pauses)
        _check_counts(self, min_ticks=0, autonomous_stride=1)
        if not 0 < self.discount <= 1:
            raise ValueError(f"algo.rule.discount: expected above 0, at most 1, got {self.discount!r}")
        if self.mask_before_takeover is not None:
            _check_counts(self, mask_before_takeover=0)

    def __call__(self, episode: EpisodeColumns) -> Selection:
        n = len(episode)
        if n < self.min_ticks:
            return Selection.rejected(n, "short")
        threshold = self.min_return if episode.threshold is None else episode.threshold
        if self.return_of(episode) < threshold:
            return Selection.rejected(n, "return")
        if self.require_success and not episode.success:
            return Selection.rejected(n, "failed")
        labels = ~before_takeover(episode.intervention, self.mask_before_takeover)
        labels &= ~_idle(episode, self.noop_threshold, self.noop_dims)
        starts = labels & (episode.intervention | (np.arange(n) % self.autonomous_stride == 0))
        starts, labels = _without_pauses(episode, starts, labels, self)
        return Selection(bool(starts.any()), "accepted" if starts.any() else "noop", starts, labels)

    def return_of(self, episode: EpisodeColumns) -> float:
        """Σ γ^t r_t, what m is compared with."""
        return float((episode.reward * self.discount ** np.arange(len(episode))).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationRule:
    """Accept successful demonstrations only: behaviour cloning on the data that a run folder holds."""

    min_ticks: int  # as in SuccessRule, and so the others
    noop_threshold: float
    noop_dims: Sequence[int] | None
    pauses: str

    def __post_init__(self) -> None:
        _check_numbers(self, "noop_threshold")
        _check_pauses(self.pauses)
        _check_counts(self, min_ticks=0)

    def __call__(self, episode: EpisodeColumns) -> Selection:
        n = len(episode)
        if episode.mode != "demo":
            return Selection.rejected(n, "online")
        if n < self.min_ticks:
            return Selection.rejected(n, "short")
        if not episode.success:
            return Selection.rejected(n, "failed")
        labels = ~_idle(episode, self.noop_threshold, self.noop_dims)
        starts, labels = _without_pauses(episode, labels.copy(), labels, self)
        return Selection(bool(starts.any()), "accepted" if starts.any() else "noop", starts, labels)


def _check_numbers(rule: object, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"algo.rule.{name}: expected a number, got {value!r}")


def _check_counts(rule: object, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"algo.rule.{name}: expected a whole number of at least {bound}, got {value!r}")


def _check_pauses(value: str) -> None:
    if value not in PAUSES:
        raise ValueError(f"algo.rule.pauses: expected one of {', '.join(PAUSES)}, got {value!r}")


def _without_pauses(
    episode: EpisodeColumns, starts: np.ndarray, labels: np.ndarray, rule: SuccessRule | DemonstrationRule
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and labels as `rule.pauses` leaves them."""
    if rule.pauses == "keep":
        return starts, labels
    moves = ~still_ticks(episode.action, rule.noop_threshold, rule.noop_dims, episode.targets)
    return starts & moves, labels & moves if rule.pauses == "drop" else labels


def still_ticks(
    action: np.ndarray, threshold: float, dims: Sequence[int] | None, targets: Sequence[int] = ()
) -> np.ndarray:
    """Ticks in which nothing is asked to move: bool[n].

    action: float32[n, ad] in units of its range. Of `dims` (None: all) none exceeds `threshold`, or is that far from
    the tick before where it is a target position; the others, such as a gripper, are as they were the tick before.

    >>> action = np.float32([[0.5, 0], [0, 0], [0, 1], [0, 1]])
    >>> still_ticks(action, 0.1, [0]).astype(int)
    array([0, 1, 0, 1])
    """
    change = np.diff(action, axis=0, prepend=action[:1])
    counted = list(range(action.shape[1]) if dims is None else dims)
    displacements = [dim for dim in counted if dim not in targets]
    moved = change.copy()
    moved[:, displacements] = action[:, displacements]
    return (np.abs(moved) <= threshold).all(axis=1)


def before_takeover(intervention: np.ndarray, reach: int | None) -> np.ndarray:
    """Policy ticks up to `reach` before each takeover (all of the policy's stretch when None): bool[n].

    >>> before_takeover(np.array([0, 0, 0, 1, 1, 0], bool), 2).astype(int)
    array([0, 1, 1, 0, 0, 0])
    """
    hidden = np.zeros(len(intervention), bool)
    for takeover in np.flatnonzero(intervention[1:] & ~intervention[:-1]) + 1:
        operator_ticks = np.flatnonzero(intervention[:takeover])
        stretch_start = operator_ticks[-1] + 1 if len(operator_ticks) else 0
        first = stretch_start if reach is None else max(stretch_start, takeover - reach)
        hidden[first:takeover] = True
    return hidden


def _idle(episode: EpisodeColumns, threshold: float, dims: Sequence[int] | None) -> np.ndarray:
    return idle_starts(episode.action, episode.intervention, threshold, dims, episode.targets)


def idle_starts(
    action: np.ndarray,
    intervention: np.ndarray,
    threshold: float,
    dims: Sequence[int] | None,
    targets: Sequence[int] = (),
) -> np.ndarray:
    """No-op ticks at the start of the episode, and where an operator has taken over and not moved yet: bool[n].

    A person needs a moment; a policy that imitates the moment stands still for ever. action: float32[n, ad] in units
    of its range; a tick moves when one of `dims` exceeds `threshold`. A target position says where, not how far: it
    moves when it is that far from where it stood at the stretch's first tick, so that a hand that trembles stands
    still and one that creeps does not. Pauses later on may belong to the task.

    >>> action, drives = np.float32([[0], [1], [0], [0], [1], [0]]), np.array([0, 0, 0, 1, 1, 1], bool)
    >>> idle_starts(action, drives, 0.1, None).astype(int)
    array([1, 0, 0, 1, 0, 0])
    >>> still_then_up = np.float32([[0.7], [0.71], [0.7], [0.9], [0.9], [0.9]])
    >>> idle_starts(still_then_up, np.ones(6, bool), 0.1, None, targets=[0]).astype(int)
    array([1, 1, 1, 0, 0, 0])
    """
    takeovers = np.flatnonzero(intervention[1:] & ~intervention[:-1]) + 1
    counted = range(action.shape[1]) if dims is None else dims
    absolute = np.isin(counted, targets)
    action, n = action[:, list(counted)], len(action)
    idle = np.zeros(n, bool)
    for start in (0, *takeovers):
        moves = action[start:] - np.where(absolute, action[start : start + 1], 0.0)
        moved = np.flatnonzero((np.abs(moves) > threshold).any(axis=1))
        end = start + int(moved[0]) if len(moved) else n
        if start:  # no further than the operator's stretch
            released = np.flatnonzero(~intervention[start:end])
            end = start + int(released[0]) if len(released) else end
        idle[start:end] = True
    return idle
