#!/usr/bin/env bash
# Every GPU figure of docs/performance.md, on a host with Python 3.12, CUDA PyTorch of our version and no network.
#   bash benchmarks/gpu.sh OUT [--wheels DIR] [--short] [--budget SECONDS] [--only pi0,swap]
#   bash benchmarks/gpu.sh OUT --rehearse      tiny, on the CPU, before a card is touched
# --wheels: a folder of benchmarks/gpu_wheels.sh, what such a host lacks; without it the Python in use has it all.
# FLOWSERL_PYTHON names that Python; else .venv's where there is one and no --wheels, else python3.
# What it does and prints: docs/performance.md, "On a card".
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

wheels="" words=()
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?gpu.sh: --wheels needs a folder}; shift 2 ;;
    *) words+=("$1"); shift ;;
  esac
done
python=${FLOWSERL_PYTHON:-python3}
[[ -n ${FLOWSERL_PYTHON:-} || -n $wheels || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python

path=$here:$root/tools
for member in flowserl_cli serl_robot_infra serl_launcher packages/serl-config/src packages/serl-transport/src packages/openpi-client/src; do
  path=$path:$root/$member
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -n $wheels ]]; then
  compgen -G "$wheels/*.whl" >/dev/null || { echo "gpu.sh: no wheels in $wheels; bash benchmarks/gpu_wheels.sh $wheels makes them where there is a network" >&2; exit 2; }
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$work/site" "$wheels"/*.whl
  path=$path:$work/site
fi
# Compiled code is shared by the stages' processes; nothing may look for a network.
export PYTHONPATH=$path TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 WANDB_MODE=offline MPLBACKEND=agg OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TMPDIR=$work
"$python" -m gpu "${words[@]}"
