"""`python -m serl_launcher.rewards <run_dir>`: the reward server role."""

import sys

from serl_launcher.rewards.server import main

sys.exit(main(sys.argv[1]))
