#!/usr/bin/env bash
# Every test that needs no GPU and no long time. Arguments go to pytest.
#   bash test.sh                     everything quick
#   bash test.sh tests/examples -x   some of it
#   bash test.sh --cov               with coverage of all packages
#   bash test.sh -m faults           what kills processes; also: slow, soak, gpu, browser
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash tools/bootstrap.sh learner
# Threads under contention are slower than one thread; nothing in the suite needs the hub or a display.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg WANDB_MODE=offline PYTHONUNBUFFERED=1
# The whole default suite is shared by two processes or more; what is named, and what measures, runs alone.
if [ $# -eq 0 ]; then set -- -n auto --maxprocesses 4 --dist worksteal; fi
exec .venv/bin/python -m pytest "$@"
