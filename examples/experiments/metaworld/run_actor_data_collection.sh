#!/usr/bin/env bash
# The robot host: the operator demonstrates, episode after episode.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
actor rollout.mode=demo "$@"
