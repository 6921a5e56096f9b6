#!/usr/bin/env bash
# examples/experiments/pick/run_actor.sh; of another task: TASK=pick_gym_hil bash run_actor.sh
source "$(dirname "$0")/examples/experiments/stage.sh"
