#!/usr/bin/env python
"""Judge a run's episodes again by another acceptance rule, from the journal: what would be imitated, what changes.

    python tools/reaccept.py runs/night1 algo.rule.min_return=0.8
    python tools/reaccept.py runs/night1 rule=demonstration
    python tools/reaccept.py runs/night1 '+algo.threshold={_target_: serl_launcher.replay.threshold.QuantileThreshold,
                                          start: 0.5, window: 20}'

Nothing of the run is changed. A running one is given another key of its rule by `tools/operate.py set`, and its views
are rebuilt at once; for another rule start the learner again with the same overrides. A finished run also needs
another schedule (docs/algorithms/reject_sampling.md has the commands). "This run's rule" is what its operators left.
`--out FILE` writes the verdicts as JSON lines. Exit codes: 0 done, 2 a mistake of the user.
"""

import needs_learner  # noqa: F401

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flowserl_cli.compose import load_config
from serl_config.mistakes import mistake_message
from serl_launcher.replay.rulebook import RuleBook, judge_journal
from serl_launcher.replay.verdicts import Verdict, rule_text
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.config import task_spec
from serl_launcher.run.foreign import foreign_config
from serl_launcher.run.live_settings import in_force
from serl_transport.contract.bounds import printable, shown

KEYS = re.compile(r"rule|algo\.(rule|threshold)(\..+)?")


def read(word: str) -> DictConfig:
    """One override. Raises ValueError for what would change no verdict."""
    key, equals, _ = word.lstrip("+").partition("=")
    if not equals:
        raise ValueError(f"cannot read {word!r}: expected key=value, such as algo.rule.min_return=0.8")
    if not KEYS.fullmatch(key):
        raise ValueError(
            f"{word!r} changes no verdict: expected rule=<name>, algo.rule.<key>=, such as algo.rule.min_return=0.8, "
            "algo.threshold.<key>= or a whole '+algo.threshold={_target_: …}'"
        )
    try:
        return OmegaConf.from_dotlist([word.lstrip("+")])
    except YAMLError as error:
        raise ValueError(f"cannot read {word!r}: {str(error).splitlines()[0]}") from None


def by(cfg: DictConfig, words: Iterable[str]) -> DictConfig:
    """The run's config with other rules. A rule's name comes first: the words beside it change its keys."""
    changes = [read(word) for word in words]
    names = [change.rule for change in changes if "rule" in change]
    other = cfg.copy()
    if names:
        other.algo.rule = load_config([f"rule={names[-1]}"]).algo.rule
        other.algo.rule.noop_dims = cfg.task.get("noop_dims")
    return OmegaConf.merge(other, *changes)


def part(algo: DictConfig, name: str) -> Any:
    """The rule or the threshold that `algo` names, built. Raises ValueError where it names none."""
    node = algo[name]
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ValueError(f"algo.{name}: expected {{_target_: <class>, …}}, got {shown(node)}")
    return instantiate(node)


def judge(run: Path, cfg: DictConfig) -> list[Verdict]:
    """The last verdict on every demonstration and online episode of the run, by `cfg.algo`."""
    spec = task_spec(cfg)
    threshold = part(cfg.algo, "threshold") if cfg.algo.get("threshold") else None
    book = RuleBook(part(cfg.algo, "rule"), spec, threshold)
    last = {verdict.ordinal: verdict for verdict in judge_journal(book, run, spec)}
    return [last[ordinal] for ordinal in sorted(last)]


def changes(before: Iterable[Verdict], after: Iterable[Verdict]) -> list[str]:
    """One line for each episode on which the two disagree."""
    old = {verdict.ordinal: verdict for verdict in before}
    lines = []
    for new in after:
        was = old[new.ordinal]
        if was.accepted != new.accepted:
            lines.append(
                f"  episode {new.ordinal} ({new.mode}, return {new.return_:g}): {was.reason} -> {new.reason}, "
                f"{was.labels} -> {new.labels} labels"
            )
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", help="rule=<name>, algo.rule.<key>=<value>, algo.threshold=…")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    try:
        cfg = foreign_config(args.run, "task.spec", "algo.rule", builds=("algo",))
        cfg = OmegaConf.create(in_force(OmegaConf.to_container(cfg), ActsLedger(args.run).state).config)
        other = by(cfg, args.overrides)
        before, after = judge(args.run, cfg), judge(args.run, other)
    except (OSError, ValueError, HydraException, OmegaConfBaseException) as error:
        print(f"reaccept: {printable(mistake_message(error))}", file=sys.stderr)
        return 2
    print("\n".join(changes(before, after)) or "  no verdict changes")
    for name, verdicts in (("this run's rule", before), (rule_text(instantiate(other.algo.rule)), after)):
        reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(v.reason for v in verdicts).items())
        print(f"  {name}: {reasons}; {sum(v.labels for v in verdicts if v.accepted)} labels")
    if args.out:
        args.out.write_text("".join(json.dumps(asdict(verdict)) + "\n" for verdict in after))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
