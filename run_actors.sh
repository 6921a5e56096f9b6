#!/usr/bin/env bash
# Several actors without a person (simulators), here or on other hosts by ssh: bash run_actors.sh 8 ip=gpu-box run=pick
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash tools/bootstrap.sh actor
exec .venv/bin/python -m flowserl_cli.actors "$@"
