#!/usr/bin/env python
"""Take a run's policy back out in LeRobot's format: config.json, model.safetensors, processors with their statistics.

    python tools/export_checkpoint.py runs/<name> <folder> [--version FILE]

Weights that the run did not train, and everything beside the weights, are copied from the checkpoint that the run began
from. Exits 2, with one line, when something is missing or does not fit.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from omegaconf import OmegaConf

from serl_launcher.agents.build import build_policy
from serl_launcher.learner.parameters import base_sha256, find_parameters, load_into
from serl_launcher.paths import RunPaths
from serl_launcher.policies.saving import save_policy
from serl_transport.specs import TaskSpec


def export(run: Path, folder: Path, version: str | None = None) -> Path:
    """Write the newest (or the named) published parameters of `run` into `folder`.

    Raises ValueError or FileNotFoundError in the user's words.
    """
    config = RunPaths(run).config
    if not config.is_file():
        raise FileNotFoundError(f"{run}: not a run folder (no config.yaml)")
    cfg = OmegaConf.load(config)
    path = run / "params" / version if version else find_parameters(run)
    policy = build_policy(cfg, TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True)))
    metadata = load_into(policy, path, base_sha256(policy))
    written = save_policy(getattr(policy, "policy", policy), folder)
    print(f"{written}: policy version {metadata['version']} of {run}, trainer step {metadata['step']}")
    report = getattr(policy, "load_report", None)
    print(report if report else "The run began at random weights; the task's ranges became the statistics.")
    return written


def main(argv: list[str] | None = None) -> int:
    """Exit 0, or 2 on a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, runs/<name>")
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--version", help="file in params/, such as v000012.safetensors; default: the newest")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        export(args.run, args.folder, args.version)
    except (ValueError, OSError) as mistake:
        print(f"export_checkpoint: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
