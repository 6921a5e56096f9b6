#!/usr/bin/env python
"""The reward audit: a classifier's verdict beside the recorded one, episode by episode, and relabelling afterwards.

    python tools/audit_reward.py runs/night1 [--model runs/night1/reward] [--relabel labels.json] [--mode eval]

Prints each disagreement and the counts of false positives and negatives; writes reward_audit.json into the run folder.
`--relabel`: {"episode id": true | false}, a person's word on some episodes. It is kept in the run's acts.jsonl, with
who and when, as by `tools/operate.py verdict`, and counts as the truth from then on: here, in train_reward.sh, and for
what the run learns, at once where it goes on. The journal is never changed. Exit codes: 0 done, 2 a mistake here.
"""

import needs_learner  # noqa: F401

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.rewards.judging import balanced_accuracy, confusion, episode_score, stages_reached, verdict_at
from serl_launcher.rewards.model import RewardCard, RewardClassifier, load
from serl_launcher.run.config import task_spec
from serl_launcher.run.foreign import foreign_config
from serl_transport.contract.bounds import printable
from serl_transport.contract.people import who
from serl_transport.contract.schema import DISCARD, Episode
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class Row:
    """One episode, judged twice."""

    ordinal: int  # of the journal
    episode_id: str
    mode: str
    recorded: bool  # success as it was recorded, or as a person corrected it
    source: str  # environment | human | classifier | relabelled
    score: float  # outcome: highest threshold at which the classifier says success; process: share of stages reached
    said: bool  # its verdict
    early: int | None  # observations between the verdict and the recorded end; None without one

    @property
    def verdict(self) -> str:
        """agrees, false positive or false negative."""
        return "agrees" if self.said == self.recorded else f"false {'positive' if self.said else 'negative'}"


def audit(
    run: Path,
    spec: TaskSpec,
    model: RewardClassifier,
    relabelled: Relabelled,
    words: Mapping[str, bool],
    mode: str | None,
) -> Iterator[Row]:
    """Every judged episode of the run. ValueError when one that `words` relabel is not there."""
    unknown = set(words)
    for ordinal, episode in journal_episodes(run, spec, relabelled=relabelled):
        unknown.discard(episode.info.episode_id)
        if mode in (None, episode.info.mode) and episode.outcome.truncated_by not in ("dead_actor", "stop", DISCARD):
            yield _row(ordinal, episode, model, episode.info.episode_id in relabelled.labels)
    if unknown:
        raise ValueError(f"--relabel names episodes that {run} does not hold: {', '.join(sorted(unknown)[:5])}")


def _row(ordinal: int, episode: Episode, model: RewardClassifier, by_person: bool) -> Row:
    images = {camera: episode.arrays[f"observation.images.{camera}"] for camera in model.card.cameras}
    said = model.probabilities(images, episode.arrays["observation.state"])
    score, at = judge(said[1:], model.card)  # what the actor would have seen: observations after an action
    return Row(
        ordinal,
        episode.info.episode_id,
        episode.info.mode,
        recorded=episode.outcome.success,
        source="relabelled" if by_person else episode.outcome.success_source,
        score=round(score, 4),
        said=at is not None,
        early=None if at is None else len(said) - 2 - at,
    )


def judge(said: np.ndarray, card: RewardCard) -> tuple[float, int | None]:
    """The score of an episode and the observation with which the actor calls it a success, by float32[n, classes]."""
    if card.kind == "outcome":
        sure = said[:, 1]
        return episode_score(sure, card.patience), verdict_at(sure, card.threshold, card.patience)
    done = stages_reached(said) / (card.classes - 1)
    return float(done[-1]), int(done.argmax()) if done[-1] == 1 else None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", type=Path, help="folder of the classifier; <run>/reward")
    parser.add_argument("--relabel", type=Path)
    parser.add_argument("--mode", choices=["demo", "online", "eval"])
    args = parser.parse_args(argv)
    try:
        spec = task_spec(foreign_config(args.run, "task.spec"))  # first: it looks where the folder's links lead
        words, relabelled = read_words(args.relabel) if args.relabel else {}, Relabelled(args.run)
        relabelled.add(words, who(), datetime.now(UTC).isoformat(timespec="seconds"))
        rows = list(audit(args.run, spec, load(args.model or args.run / "reward"), relabelled, words, args.mode))
        if words:
            relabelled.save()
    except (OSError, ValueError) as mistake:
        print(f"audit_reward: {printable(str(mistake))}", file=sys.stderr)
        return 2
    show(rows)
    if words:
        print(f"{relabelled.path}: {len(words)} episodes relabelled. train_reward.sh learns from these labels, and the")
        print("  run itself, at once where it goes on: a failure is imitated no longer, a success is")
    table = [asdict(row) | {"verdict": row.verdict} for row in rows]
    (args.run / "reward_audit.json").write_text(json.dumps(table, indent=1))
    print(f"{args.run / 'reward_audit.json'}: every episode; correct some with --relabel")
    return 0


def read_words(path: Path) -> dict[str, bool]:
    """The file of --relabel. ValueError says what is wrong with it."""
    expected = f'--relabel {path}: expected {{"episode id": true | false}}'
    try:
        words = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{expected}, got no JSON: {error}") from None
    wrong = {k: v for k, v in words.items() if type(v) is not bool} if isinstance(words, dict) else words
    if wrong or not isinstance(words, dict):
        raise ValueError(f"{expected}, got {json.dumps(wrong)[:80]}")
    return words


def show(rows: list[Row]) -> None:
    """Disagreements, then the counts, over the episodes whose truth is known: not from a classifier."""
    for row in rows:
        if row.verdict != "agrees":
            name = printable(row.episode_id)
            print(f"  {row.verdict:14}  score {row.score:.2f}  {row.mode:6}  {name}  ({row.source})")
    known = [row for row in rows if row.source != "classifier"]
    if len(known) < len(rows):
        print(f"  {len(rows) - len(known)} episodes that only a classifier judged are not counted: --relabel them")
    if not known:
        print("  no episode that the environment or a person judged")
        return
    rows = known
    counts = confusion([row.recorded for row in rows], [row.said for row in rows], 2)
    print(f"  {len(rows)} episodes: {counts[1, 1]} successes and {counts[0, 0]} failures agreed on,")
    print(f"  {counts[0, 1]} false positives, {counts[1, 0]} false negatives,")
    print(f"  balanced accuracy {balanced_accuracy(counts):.3f}")
    early = [row.early for row in rows if row.recorded and row.early is not None]
    if early:
        median, worst = statistics.median(early), max(early)
        print(f"  verdicts on successes: {median:g} observations before the end (median), {worst} at worst")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
