#!/usr/bin/env python
"""Before a session: is this robot ready? Cameras, control rate, limits, learner, operator's device, e-stop, watchdog.

    python tools/check_robot.py task=so101 run=night1 ip=<learner> [key=value ...]      # nothing moves
    python tools/check_robot.py ... --dry-run                 # asks the policy too, shows what the limits make of it
    python tools/check_robot.py ... --replay <run or dataset> --episode 3   # what they make of a recorded episode
    python tools/check_robot.py ... --move                    # resets the robot and steps it; replays for real

Takes the words of run_actor.sh; ip=null: without a learner. Writes runs/<run>/check/: report.json, a picture of each
camera. Exits 0: ready; 1: not ready, the lines marked FAILURE say why; 2: a mistake in the words.
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as examples/train_rlpd.py, before numpy is imported

from flowserl_cli.compose import ConfigError, load_config
from serl_robot_infra.check.robot import Options, check


def main(argv: list[str] | None = None) -> int:
    """Check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as for run_actor.sh: task=so101 run=night1 ip=10.0.0.5")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a lab's own config folder (docs/your_lab.md)")
    parser.add_argument("--move", action="store_true", help="the robot may be reset and stepped")
    parser.add_argument("--unattended", action="store_true", help="ask nobody to press keys")
    parser.add_argument("--remember", action="store_true", help="later checks compare the cameras with these pictures")
    parser.add_argument("--dry-run", action="store_true", help="ask the policy, send nothing, show the difference")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the loop (default: 5)")
    parser.add_argument("--replay", metavar="SOURCE", help="a run's name or folder, or a dataset's folder")
    parser.add_argument("--episode", type=int, default=0, help="of --replay; negative counts from the end")
    args = parser.parse_intermixed_args(argv)
    attended = not args.unattended and sys.stdin.isatty()
    options = Options(args.move, attended, args.remember, args.dry_run, args.seconds, args.replay, args.episode)
    try:
        if not 0 < args.seconds <= 60:
            raise ConfigError(f"--seconds: expected more than 0 and at most 60, got {args.seconds:g}")
        lab = [f"--config-dir={args.config_dir}"] if args.config_dir else []
        return check(load_config(["actor=true", *lab, *args.words]), options).exit_code
    except (ValueError, OSError) as mistake:
        print(f"check_robot: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("check_robot: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
