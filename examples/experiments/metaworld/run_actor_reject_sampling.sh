#!/usr/bin/env bash
# The robot host: the policy acts and the operator takes over when it fails.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
actor rollout.mode=online "$@"
