#!/usr/bin/env bash
# Wheels that benchmarks/gpu.sh needs beside PyTorch, for a host without a network: locked versions, hashes checked.
#   bash benchmarks/gpu_wheels.sh DIR [NAME ...]
# NAME: packages of requirements/learner.txt that this host lacks as well, such as numpy pillow torchvision.
# A PyTorch host has torch with what it depends on, torchvision, numpy and pillow; what LeRobot, Transformers and we
# import beside these is named here, and tests/benchmarks/test_gpu_rehearsal.py runs on nothing else.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:?gpu_wheels.sh: expected a folder to put wheels into}; shift
most_mb=50 # a device machine takes 64 MB with the working tree
names=(
  lerobot transformers tokenizers safetensors huggingface-hub regex tqdm packaging pyyaml requests # the models
  diffusers dm-tree attrs wrapt einops peft accelerate psutil protobuf                             # GR00T, LoRA, the learner
  draccus mergedeep typing-inspect mypy-extensions gymnasium farama-notifications deepdiff orderly-set pyserial
  pydantic pydantic-core typing-inspection annotated-types rich pygments                           # what these import
  httpx httpcore h11 anyio certifi idna charset-normalizer urllib3 click
  hydra-core omegaconf antlr4-python3-runtime msgpack pyzmq xxhash backports-zstd                  # ours
  pytest pytest-timeout pluggy iniconfig
  "$@"
)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
mkdir -p "$folder"
rm -f "$folder"/*.whl
locked=$(mktemp) source=$(mktemp)
trap 'rm -f "$locked" "$source"' EXIT

lines_of() { # lines_of NAME: its version and hashes
  awk -v name="$1" '/^[^ ]/ { on = index($0, name "==") == 1 } on' "$root/requirements/learner.txt"
}
for name in "${names[@]}"; do
  block=$(lines_of "$name")
  [[ -n $block ]] || { echo "gpu_wheels.sh: $name is not in requirements/learner.txt" >&2; exit 2; }
  # The one that has no wheel: a pure one is built from its source here.
  if [[ $name == antlr4-python3-runtime ]]; then echo "$block" >> "$source"; else echo "$block" >> "$locked"; fi
done
platforms=()
for tag in manylinux_2_{5,12,17,24,26,27,28,31,34}_x86_64 manylinux{1,2010,2014}_x86_64; do platforms+=(--platform "$tag"); done
"$python" -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" -d "$folder" -r "$locked"
"$python" -m pip wheel --quiet --disable-pip-version-check --require-hashes --no-deps --no-build-isolation -w "$folder" -r "$source"
mb=$(du -sm --apparent-size "$folder" | cut -f1)
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $mb MB in $folder"
((mb <= most_mb)) || { echo "gpu_wheels.sh: more than $most_mb MB" >&2; exit 1; }
