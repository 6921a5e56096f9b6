#!/usr/bin/env python
"""Is this host as FlowSERL needs it? Environment, lock, disk, keys, ports, network, GPU, devices, renderer, with fixes.

    .venv/bin/python tools/doctor.py [--json] [key=value ...]     # words as for run_learner.sh or run_actor.sh
    python3 tools/doctor.py                                       # before there is an environment: says how to make it

On a GPU box and on a robot host; what is not installed there is not looked at, and the line says so. Nothing is changed
and no robot is opened: tools/check_robot.py asks whether a robot is ready, tools/preflight.py whether a policy fits.
Exit codes: 0 nothing that stops a run, 1 the lines marked FAILURE say what does, 2 a mistake in the words.
"""

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("serl_robot_infra", "serl_transport", "flowserl_cli", "hydra", "omegaconf", "zmq", "numpy")


def main(argv: list[str] | None = None) -> int:
    """The exit code; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="port=5600 security.keys_dir=keys runs_dir=/data/runs ip=10.0.0.5")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a lab's own config folder (docs/your_lab.md)")
    parser.add_argument("--json", action="store_true", help="the findings as JSON, nothing else")
    args = parser.parse_intermixed_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _no_environment(missing, args.json)
    return _examine(args)


def _no_environment(missing: list[str], as_json: bool) -> int:
    """The one finding of a Python without our packages."""
    there = (ROOT / ".venv/bin/python").exists()
    says = f"{sys.executable} has no {', '.join(missing)}"
    fix = ".venv/bin/python tools/doctor.py; where that says the same: bash tools/bootstrap.sh"
    if not there:
        fix = "bash tools/bootstrap.sh, on a robot host: bash tools/bootstrap.sh actor"
    finding = {"level": "FAILURE", "check": "environment", "says": says, "fix": fix}
    if as_json:
        print(json.dumps({"ready": False, "findings": [finding]}, indent=2))
    else:
        print(f"  FAILURE  environment      {says}\n  {'':<8} {'':<16} -> {fix}\nNOT READY (1 FAILURE)")
    return 1


def _examine(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from flowserl_cli.compose import ConfigError, load_config
    from serl_robot_infra.check.report import Report
    from serl_robot_infra.doctor.host import examine

    lab = [f"--config-dir={args.config_dir}"] if args.config_dir else []
    try:
        config = OmegaConf.to_container(load_config([*lab, *args.words]))
    except ConfigError as mistake:
        print(f"doctor: {mistake}", file=sys.stderr)
        return 2
    with open(os.devnull, "w") as nowhere:
        report = Report(nowhere if args.json else sys.stdout)
        examine(report, ROOT, config)  # type: ignore[arg-type]
    if args.json:
        findings = [asdict(finding) for finding in report.findings]
        print(json.dumps({"ready": report.exit_code == 0, "findings": findings}, indent=2))
    else:
        print(f"{report.verdict()}; a robot's own check is tools/check_robot.py")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
