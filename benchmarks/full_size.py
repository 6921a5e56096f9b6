"""A policy at its released size on this machine: made at random in the released layout, and driven from load to reload.

    python benchmarks/full_size.py pi0 groot_n1_7 pi05 --folder /data/full_size --gb 13 --rows full_size.jsonl

Each step is a process of its own, one after the other: make the checkpoint, load it, three training steps and a
checkpoint, resume and publish, serve a chunk, export, serve a chunk of the export. What trains is the most of the
policy that fits into --gb by preflight's forecast. Prints a line as a step ends, and one JSON row of it to --rows:
seconds, memory beyond interpreter and libraries at its highest, and the forecast. Exits 1 when a step fails or the
exported policy acts otherwise than the published one. Needs up to 40 GB of disk for a model; weights go at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["trainer.device=cpu", "serving.device=cpu", "trainer.batch_size=1", "serving.max_batch=1"]
COMMON += ["algo.agent.noise_samples=1"]
TINY = {"pi0": "pi0_tiny", "pi05": "pi05_tiny", "groot_n1_7": "groot_tiny"}
FLOW_STEPS = {"pi0": 10, "pi05": 10, "groot_n1_7": 4}
MODES = ("full", "expert", "lora")  # from all of it to the least
SMALLER = ["++policy.attention=sdpa", "++policy.precision=bfloat16", "policy.action_horizon=null"]
SIZES: dict[str, dict[str, list[str]]] = {  # beside the released one
    "tiny": {
        "pi0": ["++policy.size.vocabulary=512", "policy.size.prompt_tokens=32", "policy.size.conv_stem=false"],
        "pi05": ["policy.size.prompt_tokens=64", "policy.size.conv_stem=false"],
        "groot_n1_7": [],
    },
    "middle": {
        "pi0": [
            *("policy.size.width=1024", "policy.size.depth=6", "policy.size.head_dim=64"),
            *("++policy.size.expert_width=512", "++policy.size.vocabulary=16384", "policy.size.prompt_tokens=32"),
            *("policy.size.vision_width=512", "policy.size.vision_layers=6", "policy.size.image_size=224"),
            "policy.size.conv_stem=false",
        ],
        "groot_n1_7": [
            *("policy.size.width=768", "policy.size.layers=6", "policy.size.vision_width=512"),
            *("policy.size.vision_layers=6", "policy.size.head_width=768", "policy.size.head_layers=12"),
            *("policy.size.image_size=256", "++policy.size.vocabulary=16384", "policy.size.prompt_tokens=32"),
        ],
    },
}
FORECAST = {"load": "loading", "train": "training", "publish": "resting", "serve": "serving", "reload": "serving"}
ALIKE = 0.05  # of the action range: adapters are merged into weights that are then held in bf16
STEPS = ("load", "train", "publish", "serve", "export", "reload")


class StepFailed(RuntimeError):  # noqa: N818  (an event of the run)
    """A step's process ended with an error, which it has printed."""


def words_of(kind: str, size: str, more: list[str]) -> list[str]:
    """Overrides of the run, but for its checkpoint and what of it trains."""
    which = [f"policy={kind if size == 'full' else TINY[kind]}"]
    which += [] if size == "full" else [*SMALLER, *SIZES[size][kind]]
    threads = 1 if size == "tiny" else 2
    which += [f"trainer.threads={threads}", f"serving.threads={threads}"]
    return [*which, f"serving.flow_steps={FLOW_STEPS[kind]}", *COMMON, *more]


def step(name: str, kind: str, folder: Path, **given: Any) -> dict[str, Any]:
    """Run a step in a process of its own. StepFailed where it fails."""
    program = "import json, sys; from pathlib import Path\nname, folder, kind, given, *paths = sys.argv[1:]\n"
    program += "sys.path[:0] = paths\nimport _full_size_steps as steps\n"
    program += "found = steps.run_step(name, steps.Place(Path(folder), kind), **json.loads(given))\n"
    program += "Path(folder, 'found.json').write_text(json.dumps(found))"
    told = [name, str(folder), kind, json.dumps(given), str(ROOT / "benchmarks"), str(ROOT / "tools")]
    if subprocess.run([sys.executable, "-c", program, *told], stdout=sys.stderr).returncode != 0:
        raise StepFailed(f"{kind}: step {name} failed")
    return json.loads((folder / "found.json").read_text())


def drive(kind: str, folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row as each step ends."""
    words = words_of(kind, args.size, args.set)
    of = {"model": kind, "size": args.size}
    folder.mkdir(parents=True)
    yield of | {"step": "make"} | step("make", kind, folder, words=words)
    modes = [args.train] if args.train else list(MODES)
    plan = step("plan", kind, folder, words=words, modes=modes, gb=args.gb)
    print(f"{kind}: by preflight's forecast it needs {plan['needed_gb']} GB of {args.gb:g}", flush=True)
    of |= {"train": plan["train"], "words": args.set}
    for name in STEPS:
        row = of | {"step": name} | step(name, kind, folder)
        yield row | ({"forecast_gb": plan["forecast"][FORECAST[name]] / 1e9} if name in FORECAST else {})


def told(row: dict[str, Any]) -> str:
    """A row for people."""
    forecast = f", forecast {row['forecast_gb']:.2f}" if "forecast_gb" in row else ""
    known = ("model", "size", "train", "words", "step", "seconds", "rss_gb", "libraries_gb", "forecast_gb")
    rest = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
    what = f"{row['model']} {row['size']}" + (f" {row['train']}" if "train" in row else "")
    return f"{what}: {row['step']} in {row['seconds']} s, {row['rss_gb']:.2f} GB{forecast}" + (f"; {rest}" * bool(rest))


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Three digits behind the point."""
    return {key: round(value, 3) if key.endswith("_gb") else value for key, value in row.items()}


def run_model(kind: str, args: argparse.Namespace) -> int:
    """All steps of a model; 1 when one fails, or the export acts otherwise."""
    folder, alike = args.folder / kind, True
    try:
        for row in map(rounded, drive(kind, folder, args)):
            print(told(row), flush=True)
            alike = row.get("difference", 0) <= (ALIKE if row.get("train") == "lora" else 0)
            if args.rows:
                with args.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        if not alike:
            print(f"full_size: {kind}: the exported policy acts otherwise than the published one", file=sys.stderr)
        return int(not alike)
    except StepFailed as problem:
        print(f"full_size: {problem}", file=sys.stderr)
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=TINY)
    parser.add_argument("--folder", type=Path, required=True, help="where weights go; a folder a model, removed after")
    parser.add_argument("--size", choices=("full", *SIZES), default="full")
    parser.add_argument("--gb", type=float, default=20.0, help="memory that a step may take (default 20)")
    parser.add_argument("--train", choices=MODES, help="what trains; default: the most that fits")
    parser.add_argument("--set", action="append", default=[], metavar="WORD", help="a further override of the run")
    parser.add_argument("--rows", type=Path, help="file that JSON rows are added to")
    parser.add_argument("--keep", action="store_true", help="leave the folders")
    args = parser.parse_args(argv)
    taken = [str(args.folder / kind) for kind in args.models if (args.folder / kind).exists()]
    if taken:
        print(f"full_size: {', '.join(taken)}: there already; name another --folder", file=sys.stderr)
        return 2
    return max(run_model(kind, args) for kind in args.models)


if __name__ == "__main__":
    sys.exit(main())
