"""A rule with its threshold schedule: judges a run's episodes one after another, in ordinal order.

The chunk view (replay.views) asks it about the ring's episodes; `judge_journal` about the journal's, for
tools/reaccept.py and for a ledger of verdicts that was damaged. The same episodes in the same order get the same
verdicts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from serl_launcher.replay.acceptance import EpisodeColumns, Selection
from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.replay.threshold import Threshold
from serl_launcher.replay.verdicts import Verdict
from serl_launcher.run.in_force import Word
from serl_transport.contract.schema import DISCARD
from serl_transport.contract.specs import TaskSpec

COLUMNS = ("action", "next.reward", "intervention", "policy_version")


class RuleBook:
    """The rule applied episode by episode; it remembers what a risen threshold may overturn.

    threshold: a schedule of m; None leaves the rule its own. ValueError: the rule does not fit the task.
    """

    def __init__(
        self, rule: Callable[[EpisodeColumns], Selection], spec: TaskSpec, threshold: Threshold | None = None
    ) -> None:
        low, high = np.float32(spec.action_low), np.float32(spec.action_high)
        self._offset, self._scale = (high + low) / 2, (high - low) / 2
        check_noop_dims(getattr(rule, "noop_dims", None), spec)
        self._rule, self.threshold, self._targets = rule, threshold, tuple(spec.target_dims)
        self.clear()

    def clear(self) -> None:
        self._accepted_online: dict[int, Verdict] = {}  # by ordinal; a risen m may still reject them
        if self.threshold is not None:
            self.threshold.reset()

    def remember(self, history: Iterable[tuple[str, float]]) -> None:
        """Mode and return of earlier episodes, for the threshold alone."""
        for mode, return_ in history if self.threshold is not None else ():
            if math.isfinite(return_):
                self.threshold.observe(mode, return_)

    def judge(
        self,
        ordinal: int,
        mode: str,
        success: bool,
        columns: Mapping[str, np.ndarray],
        word: Word | None = None,
    ) -> tuple[Selection, list[Verdict]]:
        """The next episode: which ticks count, its verdict, and those of earlier ones that it overturns.

        columns: COLUMNS of the episode, n rows each, and success as people corrected them; word: what they said of it.
        An overturned verdict: m has risen above an online episode's return, and the indicator I_m of the loss is of
        today's m.
        """
        episode = EpisodeColumns(
            mode=mode,
            success=success,
            reward=columns["next.reward"],
            action=(columns["action"] - self._offset) / self._scale,
            intervention=columns["intervention"],
            threshold=None if self.threshold is None else self.threshold.value,
            targets=self._targets,
        )
        finite = bool(np.isfinite(episode.reward).all())
        use = word.use if word else None
        selection = self._select(episode, use) if finite else Selection.rejected(len(episode), "reward_not_finite")
        worth = getattr(self._rule, "return_of", _sum_of_rewards)(episode)
        verdict = _verdict(ordinal, episode, columns["policy_version"], selection, worth, word.act if word else 0)
        if self.threshold is None or not finite or use == "discard":
            return selection, [verdict]
        if selection.accepted and mode == "online" and use is None:
            self._accepted_online[ordinal] = verdict
        self.threshold.observe(mode, verdict.return_)
        return selection, [verdict, *self._overturn(self.threshold.value)]

    def _select(self, episode: EpisodeColumns, use: str | None) -> Selection:
        """By the rule, or by a person's word in its place."""
        if use in ("reject", "discard"):
            return Selection.rejected(len(episode), f"{use}_by_person")
        if use is None:
            return self._rule(episode)
        # What the rule would hide in a success of any return stays hidden.
        selection = self._rule(replace(episode, success=True, threshold=-math.inf))
        if not selection.accepted:
            every = np.ones(len(episode), bool)
            selection = Selection(True, "", every, every.copy())
        return replace(selection, reason="accept_by_person")

    def _overturn(self, m: float) -> list[Verdict]:
        fallen = [self._accepted_online.pop(o) for o, v in list(self._accepted_online.items()) if v.return_ < m]
        return [replace(v, accepted=False, reason="threshold_rose", starts=0, labels=0, threshold=m) for v in fallen]


def judge_journal(book: RuleBook, run_dir: Path, spec: TaskSpec) -> Iterator[Verdict]:
    """Verdicts on every demonstration and online episode of a run, as they come; a later one overturns an earlier.

    Evaluations and what a person threw away are not learned from, so not judged.
    """
    relabelled = Relabelled(run_dir)
    for ordinal, episode in journal_episodes(run_dir, spec, relabelled=relabelled):
        if episode.info.mode != "eval" and episode.outcome.truncated_by != DISCARD:
            word = relabelled.words.get(episode.info.episode_id)
            yield from book.judge(ordinal, episode.info.mode, episode.outcome.success, episode.arrays, word)[1]


def check_noop_dims(dims: Sequence[int] | None, spec: TaskSpec) -> None:
    """They are dimensions of the task's action. Raises ValueError that names task.noop_dims."""
    n = len(spec.action_names)
    if dims is not None and (isinstance(dims, int | str) or not dims or any(d not in range(n) for d in dims)):
        got = dims if isinstance(dims, int | str) else list(dims)
        raise ValueError(
            f"task.noop_dims (algo.rule.noop_dims): expected a list of dimensions of the action, "
            f"0 to {n - 1} ({', '.join(spec.action_names)}), or null (all), got {got}"
        )


def _sum_of_rewards(episode: EpisodeColumns) -> float:
    return float(episode.reward.sum())


def _verdict(
    ordinal: int, episode: EpisodeColumns, versions: np.ndarray, selection: Selection, worth: float, act: int
) -> Verdict:
    return Verdict(
        ordinal=ordinal,
        mode=episode.mode,
        ticks=len(episode),
        return_=worth,
        success=episode.success,
        operator_ticks=int(episode.intervention.sum()),
        policy_versions=(int(versions.min()), int(versions.max())),
        accepted=selection.accepted,
        reason=selection.reason,
        starts=int(selection.starts.sum()),
        labels=int(selection.labels.sum()),
        threshold=episode.threshold,
        act=act,
    )
