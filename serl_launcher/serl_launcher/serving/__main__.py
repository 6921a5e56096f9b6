"""`python -m serl_launcher.serving <run_dir>`: the policy server."""

import sys

from serl_launcher.serving.server import main

sys.exit(main(sys.argv[1]))
