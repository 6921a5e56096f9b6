#!/usr/bin/env python
"""The reward audit: a classifier's verdict beside the recorded one, episode by episode, and relabelling afterwards.

    python tools/audit_reward.py runs/night1 [--model runs/night1/reward] [--relabel labels.json] [--mode eval]

Prints each disagreement and the counts of false positives and negatives; writes reward_audit.json into the run folder.
`--relabel`: {"episode id": true | false}, a person's word on some episodes, which then counts as the truth; the journal
is never changed. Exit codes: 0 done, 2 a mistake of the user.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf

from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.rewards.judging import balanced_accuracy, confusion, episode_score, verdict_at
from serl_launcher.rewards.model import RewardClassifier, load
from serl_transport.schema import Episode
from serl_transport.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class Row:
    """One episode, judged twice."""

    ordinal: int  # of the journal
    episode_id: str
    mode: str
    recorded: bool  # success as it was recorded, or as a person corrected it
    source: str  # environment | human | classifier | relabelled
    score: float  # highest threshold at which the classifier says success
    said: bool  # its verdict
    early: int | None  # observations between the verdict and the recorded end; None without one

    @property
    def verdict(self) -> str:
        """agrees, false positive or false negative."""
        return "agrees" if self.said == self.recorded else f"false {'positive' if self.said else 'negative'}"


def audit(run: Path, model: RewardClassifier, relabel: dict[str, bool], mode: str | None) -> Iterator[Row]:
    """Every judged episode of the run. ValueError when a relabelled episode is not there."""
    spec = TaskSpec.from_dict(OmegaConf.to_container(OmegaConf.load(run / "config.yaml").task.spec, resolve=True))
    unknown = set(relabel)
    for ordinal, episode in journal_episodes(run, spec):
        unknown.discard(episode.info.episode_id)
        if mode in (None, episode.info.mode) and episode.outcome.truncated_by not in ("dead_actor", "stop"):
            yield _row(ordinal, episode, model, relabel)
    if unknown:
        raise ValueError(f"--relabel names episodes that {run} does not hold: {', '.join(sorted(unknown)[:5])}")


def _row(ordinal: int, episode: Episode, model: RewardClassifier, relabel: dict[str, bool]) -> Row:
    images = {camera: episode.arrays[f"observation.images.{camera}"] for camera in model.card.cameras}
    said = model.probabilities(images, episode.arrays["observation.state"])
    # What the actor would have seen: observations after an action, so not the first one.
    score = episode_score(said[1:, -1], model.card.patience)
    at = verdict_at(said[1:, -1], model.card.threshold, model.card.patience)
    known = relabel.get(episode.info.episode_id)
    return Row(
        ordinal,
        episode.info.episode_id,
        episode.info.mode,
        recorded=episode.outcome.success if known is None else known,
        source=episode.outcome.success_source if known is None else "relabelled",
        score=round(score, 4),
        said=score >= model.card.threshold,
        early=None if at is None else len(said) - 2 - at,
    )


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", type=Path, help="folder of the classifier; <run>/reward")
    parser.add_argument("--relabel", type=Path)
    parser.add_argument("--mode", choices=["demo", "online", "eval"])
    args = parser.parse_args(argv)
    try:
        if not (args.run / "config.yaml").exists():
            raise FileNotFoundError(f"{args.run}: expected a run folder with config.yaml and a journal")
        relabel = read_labels(args.relabel) if args.relabel else {}
        rows = list(audit(args.run, load(args.model or args.run / "reward"), relabel, args.mode))
    except (FileNotFoundError, ValueError) as mistake:
        print(f"audit_reward: {mistake}", file=sys.stderr)
        return 2
    show(rows)
    table = [asdict(row) | {"verdict": row.verdict} for row in rows]
    (args.run / "reward_audit.json").write_text(json.dumps(table, indent=1))
    print(f"{args.run / 'reward_audit.json'}: every episode; correct some with --relabel")
    return 0


def read_labels(path: Path) -> dict[str, bool]:
    """Episode id -> a person's word. ValueError names the file and what it holds instead."""
    expected = f'--relabel {path}: expected {{"episode id": true, "another": false}}'
    try:
        labels = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{expected}, got no JSON ({error})") from None
    if not isinstance(labels, dict):
        raise ValueError(f"{expected}, got {json.dumps(labels)[:60]}")
    wrong = next((item for item in labels.items() if not isinstance(item[1], bool)), None)
    if wrong:
        raise ValueError(f"{expected}, got {json.dumps(dict([wrong]))[:60]}")
    return labels


def show(rows: list[Row]) -> None:
    """Disagreements, then the counts."""
    for row in rows:
        if row.verdict != "agrees":
            print(f"  {row.verdict:14}  score {row.score:.2f}  {row.mode:6}  {row.episode_id}  ({row.source})")
    if not rows:
        print("  no judged episode")
        return
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
