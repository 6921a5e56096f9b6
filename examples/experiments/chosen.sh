#!/usr/bin/env bash
# What run_actor.sh and run_learner.sh of the root share: the script $1 of the task that TASK names.
set -euo pipefail
FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TASK=${TASK:-pick}
if [[ ! -f "$FOLDER/$TASK/$1.sh" ]]; then
  scripts=$(cd "$FOLDER" && echo */)
  tasks=$(cd "$FOLDER/../../config/task" && echo *.yaml)
  echo "$1: TASK=$TASK has no scripts; expected one of: ${scripts//\//}" >&2
  echo "Any task of config/task (${tasks//.yaml/}) runs with: bash $1.sh task=<name> run=<name>" >&2
  exit 2
fi
exec bash "$FOLDER/$TASK/$1.sh" "${@:2}"
