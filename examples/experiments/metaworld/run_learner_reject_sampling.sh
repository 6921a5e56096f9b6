#!/usr/bin/env bash
# Online rejection sampling from the newest parameters of runs/<task>/ (or checkpoint_path=).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
learner schedule=reject_sampling algo=reject_sampling_pi0 "$@"
