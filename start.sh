#!/usr/bin/env bash
# The quick start: actor and learner on this machine, from nothing but Python 3.12. `bash start.sh --help` says more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ " $* " == *" --stop "* && ! -x .venv/bin/python ]]; then echo "nothing to stop: start.sh runs nothing here"; exit 0; fi
bash tools/bootstrap.sh learner
exec .venv/bin/python -m flowserl_cli.start "$@"
