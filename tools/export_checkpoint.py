#!/usr/bin/env python
"""Take a run's policy back out in LeRobot's format (GR00T in NVIDIA's): config, weights, normalisation statistics.

    python tools/export_checkpoint.py runs/<name> <folder> [--version best|FILE]

Weights that the run did not train, and everything beside the weights, are copied from the checkpoint that the run began
from. flowserl_origin.json says which code, config and data made them (tools/runs.py show <folder>). Exits 2, with one
line, when something is missing or does not fit.
"""

from __future__ import annotations

import needs_learner  # noqa: F401

import argparse
import logging
import sys
from pathlib import Path

from omegaconf import OmegaConf

from serl_launcher.agents.build import build_policy
from serl_launcher.run.files import read_json, write_sealed
from serl_launcher.run.foreign import foreign_config
from serl_launcher.run.parameters import base_sha256, find_version, load_into
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import EXPORTED_ORIGIN, origin_of
from serl_transport.contract.bounds import printable
from serl_transport.contract.specs import TaskSpec


def export(run: Path, folder: Path, version: str | None = None) -> Path:
    """Write the newest (or the named) published parameters of `run` into `folder`.

    Raises ValueError or FileNotFoundError in the user's words.
    """
    config = RunPaths(run).config
    if not config.is_file():
        raise FileNotFoundError(f"{run}: not a run folder (no config.yaml)")
    cfg = foreign_config(run, "task.spec", "policy", builds=("policy", "algo"))
    path = find_version(run, version)
    policy = build_policy(cfg, TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True)))
    metadata = load_into(policy, path, base_sha256(policy))
    # What GR00T's layout keeps beside the weights; optimizer state never goes along.
    extras = {"trainer_state.json": {"global_step": int(metadata["step"])}, "experiment_cfg/config.yaml": config}
    if (run / "modality.json").is_file():
        extras["modality.json"] = run / "modality.json"
    written = policy.save(folder, extras)
    made = (read_json(path.with_suffix(".json")) or {}).get("time")
    origin = origin_of(RunPaths(run), int(metadata["step"]), int(metadata["version"]), made)
    write_sealed(written / EXPORTED_ORIGIN, origin, indent=1)
    print(f"{written}: policy version {metadata['version']} of {run}, trainer step {metadata['step']}")
    began = "The run began at random weights; the task's ranges became the statistics."
    print(getattr(policy, "load_report", began))
    if served := cfg.get("algo") and cfg.algo.get("served"):
        print(f"the flow alone: no format has a place for what {cfg.algo.name} serves beside it ({served._target_})")
    return written


def main(argv: list[str] | None = None) -> int:
    """Exit 0, or 2 on a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, runs/<name>")
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--version", help="best (of a fine-tuning run), or a file in params/; default: the newest")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        export(args.run, args.folder, args.version)
    except (ValueError, OSError) as mistake:
        print(f"export_checkpoint: {printable(str(mistake))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
