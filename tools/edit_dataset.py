#!/usr/bin/env python
"""Datasets of datasets: list, choose, merge, relabel, split, lay out for GR00T, push. A source is never changed.

    python tools/edit_dataset.py list runs/night1 [--success yes --mode demo]
    python tools/edit_dataset.py copy OUT SOURCE [SOURCE ...] [--success yes] [--drop 3,5-7] [--rename OLD NEW] ...
    python tools/edit_dataset.py split OUT SOURCE train=0.9 held_out=0.1 [--seed 0]      # OUT/train, OUT/held_out
    python tools/edit_dataset.py groot OUT SOURCE [--modality FILE]   # LeRobot v2.1 with modality.json
    python tools/edit_dataset.py push SOURCE owner/name [--private]

SOURCE: a run's folder, a LeRobot v3 folder or a hub name. OUT must not exist; what is written is read back and compared
with its sources, row by row, before it gets that name. Exit codes: 0 done, 2 a mistake, in one line.
"""

import needs_learner  # noqa: F401

import argparse
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from serl_launcher.curation.check import check
from serl_launcher.curation.groot import check_groot, write_groot
from serl_launcher.curation.rows import Renaming
from serl_launcher.curation.sources import EpisodeFacts, Filter, Opened
from serl_launcher.curation.writer import write
from serl_launcher.telemetry.comparison import table
from serl_transport.contract.bounds import printable

YES_NO = {"yes": True, "no": False}
MAX_NUMBERS = 1_000_000


def main(argv: list[str] | None = None) -> int:
    """The exit code; see the module's docstring."""
    words = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        args.run(args, " ".join(words))
    except (ValueError, OSError) as mistake:
        print(f"edit_dataset: {printable(' '.join(str(mistake).split()))}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("list", help="the episodes, and what is said of each")
    listing.add_argument("sources", nargs="+")
    listing.set_defaults(run=list_episodes)
    copying = commands.add_parser("copy", help="the chosen episodes of one or more sources as a new dataset")
    copying.add_argument("out", type=Path)
    copying.add_argument("sources", nargs="+")
    copying.add_argument("--text", help="in place of every prompt")
    copying.add_argument("--rename", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="a prompt")
    copying.set_defaults(run=copy)
    splitting = commands.add_parser("split", help="several new datasets of one source, no episode in two")
    splitting.add_argument("out", type=Path)
    splitting.add_argument("source")
    splitting.add_argument("parts", nargs="+", metavar="NAME=SHARE", help="shares of the chosen episodes, 1 in all")
    splitting.add_argument("--seed", type=int, default=0, help="of the order in which episodes are drawn")
    splitting.set_defaults(run=split)
    for command in (listing, copying, splitting):
        _add_filter(command)
    groot = commands.add_parser("groot", help="the layout that Isaac-GR00T reads")
    groot.add_argument("out", type=Path)
    groot.add_argument("source")
    groot.add_argument(
        "--modality", type=Path, metavar="FILE", help="modality.json; default: the source's, or by names"
    )
    groot.set_defaults(run=for_groot)
    pushing = commands.add_parser("push", help="onto the hub, by LeRobot (huggingface-cli login first)")
    pushing.add_argument("source")
    pushing.add_argument("name", help="owner/name")
    pushing.add_argument("--private", action="store_true")
    pushing.set_defaults(run=push)
    return parser


def _add_filter(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("which episodes (default: all that nobody threw away)")
    group.add_argument("--success", choices=YES_NO, help="of a run, as people judged it afterwards")
    group.add_argument("--helped", choices=YES_NO, help="did the operator drive any tick")
    group.add_argument("--mode", action="append", choices=("demo", "online", "eval"))
    group.add_argument("--stage", action="append")
    group.add_argument("--actor", action="append", help="unique_identifier of who recorded it")
    group.add_argument("--operator", action="append", help="who drove or judged, as in a shell: 'Ann*', script")
    group.add_argument("--prompt", help="as in a shell: '*red*'")
    group.add_argument("--versions", metavar="A-B", help="policy versions that drove, all within; -1: no policy")
    group.add_argument("--episodes", metavar="0,3,5-9", help="of one source")
    group.add_argument("--drop", metavar="0,3,5-9", help="of one source")
    group.add_argument("--discarded", action="store_true", help="also what a person threw away")


def filter_of(args: argparse.Namespace) -> Filter:
    """The words as a filter. ValueError names the one that cannot be read."""
    return Filter(
        success=YES_NO.get(args.success),
        helped=YES_NO.get(args.helped),
        modes=args.mode,
        stages=args.stage,
        actors=args.actor,
        operators=args.operator,
        prompt=args.prompt,
        versions=_versions(args.versions),
        episodes=None if args.episodes is None else numbers("--episodes", args.episodes),
        drop=numbers("--drop", args.drop) if args.drop else (),
        discarded=args.discarded,
    )


def numbers(word: str, text: str) -> set[int]:
    """`0,3,5-9` as numbers. ValueError names the part that is none."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            first, last = int(low), int(high if dash else low)
        except ValueError:
            raise ValueError(f"{word}: expected numbers such as 0,3,5-9, got {part!r}") from None
        if not 0 <= first <= last < first + MAX_NUMBERS:
            raise ValueError(f"{word}: expected a range from low to high, got {part!r}")
        found |= set(range(first, last + 1))
    return found


def _versions(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    low, _, high = text.lstrip("-").partition("-")
    try:
        first = -int(low) if text.startswith("-") else int(low)
        return first, int(high) if high else first
    except ValueError:
        raise ValueError(f"--versions: expected 3-7, 3 or -1, got {text!r}") from None


def chosen_of(names: Sequence[str], args: argparse.Namespace) -> tuple[list[Opened], list[EpisodeFacts]]:
    """The sources, and the episodes of them that the words choose; what is left out is printed."""
    sources = [Opened(name, place) for place, name in enumerate(names)]
    kept, left = filter_of(args).chosen([one for source in sources for one in source.episodes])
    for reason, count in sorted(left.items()):
        print(f"left out: {count} {reason}")
    if not kept:
        raise ValueError("no episode is left")
    return sources, kept


def list_episodes(args: argparse.Namespace, _words: str) -> None:
    """A line per episode, and the sum."""
    sources, kept = chosen_of(args.sources, args)
    head = ["source", "episode", "rows", "success", "by", "mode", "stage", "actor", "help", "people", "versions"]
    print("\n".join(table([*head, "prompt"], [[printable(cell) for cell in cells(sources, one)] for one in kept])))
    succeeded = sum(one.success is True for one in kept)
    print(f"{len(kept)} episodes, {sum(one.n for one in kept)} rows, {succeeded} successes")


def cells(sources: Sequence[Opened], one: EpisodeFacts) -> list[str]:
    """An episode in the list; `-`: nothing is said."""
    success = "-" if one.success is None else "yes" if one.success else "no"
    helped = "-" if one.helped is None else f"{one.helped:.0%}"
    low, high = one.versions or (None, None)
    versions = "-" if low is None else f"{low}" if low == high else f"{low}-{high}"
    said = [one.said_by, one.mode, one.stage, one.actor]
    return [
        sources[one.source].name, str(one.index), str(one.n), success, *(text or "-" for text in said),
        helped, ", ".join(one.people or ()) or "-", versions, " | ".join(one.prompts),
    ]  # fmt: skip


def copy(args: argparse.Namespace, words: str) -> None:
    """Filter, drop, merge, relabel: one new dataset."""
    if args.text is not None and (args.rename or not args.text.strip()):
        raise ValueError("--text: expected one text in place of every prompt, and no --rename beside it")
    sources, kept = chosen_of(args.sources, args)
    _write_whole(args.out, sources, kept, Renaming(args.text, dict(args.rename)), words)


def split(args: argparse.Namespace, words: str) -> None:
    """Parts of one source, drawn by the seed; each in the source's order."""
    shares = [shared(part) for part in args.parts]
    if len({name for name, _ in shares}) < len(shares) or abs(sum(share for _, share in shares) - 1) > 1e-6:
        raise ValueError("expected different names and shares that are 1 in all, such as train=0.9 held_out=0.1")
    sources, kept = chosen_of([args.source], args)
    order = list(range(len(kept)))
    random.Random(args.seed).shuffle(order)
    ends = [round(len(kept) * sum(share for _, share in shares[:k])) for k in range(len(shares) + 1)]
    parts = {name: sorted(order[a:b]) for (name, _), a, b in zip(shares, ends[:-1], ends[1:], strict=True)}
    if empty := [name for name, places in parts.items() if not places]:
        raise ValueError(f"{empty[0]}: no episode is left for it, of {len(kept)}")
    for name in parts:
        refuse_existing(args.out / name)
    for name, places in parts.items():
        _write_whole(args.out / name, sources, [kept[k] for k in places], Renaming(), words)


def shared(text: str) -> tuple[str, float]:
    """`train=0.9`. ValueError says what is wrong with it."""
    name, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not name or "/" in name or name.startswith(".") or not 0 < value < 1:
        raise ValueError(f"expected NAME=SHARE with a share between 0 and 1, such as train=0.9, got {text!r}")
    return name, value


def for_groot(args: argparse.Namespace, words: str) -> None:
    """One source, whole, in GR00T's layout."""
    modality = json.loads(args.modality.read_text(encoding="utf-8")) if args.modality else None

    def fill(part: Path) -> None:
        used = write_groot(part, args.source, words, modality)
        rows = check_groot(part, args.source)
        for section in ("state", "action"):
            told = ", ".join(f"{name} {part['start']}:{part['end']}" for name, part in used[section].items())
            print(f"modality.json: {section}: {told}")
        print(f"wrote {args.out}: {rows} rows read back and compared; the pictures are h264 now")

    _whole(args.out, fill)


def push(args: argparse.Namespace, _words: str) -> None:
    """LeRobot's own upload, of a dataset that is whole here."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from lerobot.datasets import LeRobotDataset

    if args.name.count("/") != 1 or not all(args.name.split("/")):
        raise ValueError(f"expected owner/name on the hub, got {args.name!r}")
    opened = Opened(args.source, 0)
    try:
        LeRobotDataset(args.name, root=opened.folder).push_to_hub(private=args.private)
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as refusal:
        raise ValueError(f"the hub did not take it: {str(refusal).strip().splitlines()[0]}") from None
    print(f"pushed {opened.folder} to {args.name}{' (private)' if args.private else ''}")


def _write_whole(
    out: Path, sources: Sequence[Opened], kept: Sequence[EpisodeFacts], renaming: Renaming, words: str
) -> None:
    refuse_existing(out)
    for source in sources:
        if out.absolute().resolve().is_relative_to((source.run or source.folder).resolve()):
            raise ValueError(f"{out} lies in {source.name}, and a source is never changed; name a place outside")

    def fill(part: Path) -> None:
        written = write(part, sources, kept, renaming, words)
        rows = check(part, sources, kept, renaming)
        print(
            f"wrote {out}: {written.episodes} episodes, {rows} rows read back and compared, "
            f"{len(written.tasks)} prompts"
        )
        if judged := sum(one.label is not None for one in kept):
            print(f"{judged} episodes end as people judged them afterwards")
        if written.unused:
            print(f"{written.unused} frames of episodes that were left out lie on in the mp4 files, which go whole")

    _whole(out, fill)


def _whole(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` make a folder beside `out`, then give it that name; nothing is left where it fails."""
    refuse_existing(out)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        fill(part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """ValueError where something lies there."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists; name a folder that does not")


if __name__ == "__main__":
    sys.exit(main())
