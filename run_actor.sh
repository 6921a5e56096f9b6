#!/usr/bin/env bash
# The default task from the repository root: see examples/experiments/pick/run_actor.sh. Another: TASK=pick_gym_hil.
exec bash "$(dirname "${BASH_SOURCE[0]}")/examples/experiments/chosen.sh" run_actor "$@"
