#!/usr/bin/env bash
# The shared part of every run script: sourced by them, it offers `actor` and `learner`.
# A script is: source common.sh; one side; that side's overrides; "$@" (the user's overrides come last and win).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
TASK=$(basename "$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)")

train() { # train ENVIRONMENT OVERRIDES...: runs/ and relative paths are those of the repository
  bash "$ROOT/tools/bootstrap.sh" "$1"
  cd "$ROOT"
  exec "$ROOT/.venv/bin/python" "$ROOT/examples/train_rlpd.py" "task=$TASK" "run=$TASK" "${@:2}"
}
# One task, one run folder: what a collection script recorded is what the training script finds.
actor() { train actor actor=true "$@"; }
learner() { train learner learner=true "$@"; }
