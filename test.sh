#!/usr/bin/env bash
# Every test that needs no GPU and no long time, with coverage of the four packages. Arguments go to pytest.
#   bash test.sh                     everything quick
#   bash test.sh tests/examples -x   some of it
#   bash test.sh -m faults           what kills processes; also: slow, soak, gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash tools/bootstrap.sh learner
# Threads under contention are slower than one thread; nothing in the suite needs the hub or a display.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg WANDB_MODE=offline PYTHONUNBUFFERED=1
exec .venv/bin/python -m pytest --cov=flowserl_cli --cov=serl_config --cov=openpi_client --cov=serl_transport --cov=serl_robot_infra --cov=serl_launcher \
  --cov-report=term:skip-covered "$@"
