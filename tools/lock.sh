#!/usr/bin/env bash
# Re-resolve the pins: writes requirements/{learner,actor,lerobot}.txt with hashes and without any address.
# Run it by hand after a dependency changes in a pyproject.toml; a maintainer reviews the diff.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=.venv/bin/uv
members=(flowserl-cli serl-config openpi-client serl-transport serl-robot-infra serl-launcher flowserl)
skip=(); for m in "${members[@]}"; do skip+=(--no-emit-package "$m"); done
compile() { # compile OUT SOURCE...
  local out=$1; shift
  "$uv" pip compile -q --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
    --universal --python-version 3.12 "${skip[@]}" --group pyproject.toml:dev -o "$out" "$@"
}
compile requirements/learner.txt --all-extras serl_launcher/pyproject.toml serl_robot_infra/pyproject.toml packages/serl-config/pyproject.toml packages/openpi-client/pyproject.toml packages/serl-transport/pyproject.toml
compile requirements/actor.txt --extra sim --extra data serl_robot_infra/pyproject.toml flowserl_cli/pyproject.toml packages/openpi-client/pyproject.toml packages/serl-transport/pyproject.toml packages/serl-config/pyproject.toml -c requirements/learner.txt
# A robot host with LeRobot's drivers: bootstrap.sh installs torch's CPU build itself, so neither it nor CUDA is listed.
for m in $(grep -oE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==' requirements/learner.txt | tr -d =); do
  skip+=(--no-emit-package "$m")
done
compile requirements/lerobot.txt --extra sim --extra data --extra lerobot serl_robot_infra/pyproject.toml flowserl_cli/pyproject.toml packages/openpi-client/pyproject.toml packages/serl-transport/pyproject.toml packages/serl-config/pyproject.toml -c requirements/learner.txt
if grep -nE 'https?://|file://|--(extra-)?index-url|--find-links' requirements/*.txt; then
  echo "lock.sh: the lines above record an address; remove their cause" >&2; exit 1
fi
wc -l requirements/*.txt
