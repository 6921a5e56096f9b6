#!/usr/bin/env bash
# The robot host: evaluation episodes without help, against a learner that runs (run_learner.sh schedule=eval).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
actor rollout.mode=eval "$@"
