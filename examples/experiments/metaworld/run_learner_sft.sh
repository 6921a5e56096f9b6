#!/usr/bin/env bash
# Behaviour cloning on the demonstrations that runs/<task>/ holds; needs no actor.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
learner schedule=sft algo=sft_pi0 "$@"
