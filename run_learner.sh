#!/usr/bin/env bash
# examples/experiments/pick/run_learner.sh; of another task: TASK=pick_gym_hil bash run_learner.sh
source "$(dirname "$0")/examples/experiments/stage.sh"
