#!/usr/bin/env bash
# What all run scripts share. Sourced by examples/experiments/<task>/<stage>.sh: its folder names the task, its file the
# stage. run_actor.sh and run_learner.sh of the root source it too; there TASK names the task.
set -euo pipefail
EXPERIMENTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$EXPERIMENTS/../.." && pwd)
FOLDER=$(cd "$(dirname "$0")" && pwd)
STAGE=$(basename "$0" .sh)

if [[ $FOLDER == "$ROOT" ]]; then
  TASK=${TASK:-pick}
  [[ -f $EXPERIMENTS/$TASK/$STAGE.sh ]] && exec bash "$EXPERIMENTS/$TASK/$STAGE.sh" "$@"
  scripts=$(cd "$EXPERIMENTS" && echo */)
  tasks=$(cd "$ROOT/config/task" && echo [^_]*.yaml)
  echo "$STAGE: TASK=$TASK has no scripts; expected one of: ${scripts//\//}" >&2
  echo "Any task of config/task (${tasks//.yaml/}) runs with: bash $STAGE.sh task=<name> run=<name>" >&2
  exit 2
fi

case $STAGE in
  # The robot host.
  run_actor) words=(rollout.mode=follow) ;;                    # does what the learner's schedule asks
  run_actor_data_collection) words=(rollout.mode=demo) ;;      # the operator demonstrates, episode after episode
  run_actor_reject_sampling) words=(rollout.mode=online) ;;    # the policy acts, the operator takes over when it fails
  run_actor_eval) words=(rollout.mode=eval) ;;                 # without help; its learner: run_learner.sh schedule=eval
  # The GPU box.
  run_learner) words=() ;;                                     # demonstrations, cloning, evaluation, online, evaluation
  run_learner_data_collection) words=(schedule=data_collection) ;;   # records into runs/<task>/; no training
  run_learner_sft) words=(schedule=sft algo=sft_pi0) ;;              # cloning on what runs/<task>/ holds; needs no actor
  run_learner_reject_sampling) words=(schedule=reject_sampling algo=reject_sampling_pi0) ;; # from its newest parameters
  *) echo "$STAGE.sh: no such stage; examples/experiments/stage.sh says what each of them does" >&2; exit 2 ;;
esac

side=${STAGE#run_} side=${side%%_*} # actor | learner
task=$(basename "$FOLDER")          # one task, one run folder: what one stage recorded is what the next one finds
bash "$ROOT/tools/bootstrap.sh" "$side"
cd "$ROOT" # runs/ and relative paths are those of the repository
# The user's overrides come last and win. Whoever dies is started again: the actor, the learner's supervisor.
words=("task=$task" "run=$task" "${words[@]}" "$@")
exec "$ROOT/.venv/bin/python" -m flowserl_cli.keep "$side" "${words[@]}"
