#!/usr/bin/env bash
# The robot host: does what the learner's schedule asks (demonstrations, online episodes, evaluation).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
actor rollout.mode=follow "$@"
