#!/usr/bin/env bash
# Records demonstrations into runs/<task>/; no training.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
learner schedule=data_collection "$@"
