#!/usr/bin/env bash
# The GPU box, whole schedule: demonstrations, cloning, evaluation, online training, evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
learner "$@"
