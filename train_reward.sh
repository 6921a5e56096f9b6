#!/usr/bin/env bash
# Train a reward classifier from a run's labelled episodes: bash train_reward.sh run=runs/quickstart [kind=process …]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$ROOT/tools/bootstrap.sh" learner
exec "$ROOT/.venv/bin/python" "$ROOT/examples/train_reward_classifier.py" "$@"
