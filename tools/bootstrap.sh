#!/usr/bin/env bash
# Makes .venv ready: called first by start.sh, test.sh and every run script, with nothing but Python 3.12 and bash at hand.
#   tools/bootstrap.sh [learner|actor|lerobot]
# learner (default): everything, torch included. actor: a robot host, no torch. lerobot: a robot host that uses LeRobot's
# drivers, which import torch: its CPU build. Each serves those after it: learner, lerobot, actor.
# A stamp (hash of the pins, the members and this script) makes the second call a no-op; an interrupted install has no
# stamp and is repaired by the next call. Exit code 2: something the user can fix, said in one message.
set -euo pipefail

kind=${1:-learner}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
uv_version=0.13.8
members=(packages/serl-config packages/serl-transport packages/openpi-client serl_robot_infra flowserl_cli)

say() { printf '[bootstrap] %s\n' "$*" >&2; }
die() { printf 'bootstrap: %s\n' "$*" >&2; exit 2; }

fingerprint() { # fingerprint KIND: changes whenever the environment of KIND must be installed anew
  { printf '%s\n' "$root" "$1"
    cat "$root/requirements/$1.txt" "$root"/packages/*/pyproject.toml "$root"/serl_*/pyproject.toml "$root"/flowserl_cli/pyproject.toml "$root/tools/bootstrap.sh"
  } | sha256sum | cut -d' ' -f1
}

ready() { # ready KIND: the stamp of KIND is true
  local stamp=$venv/.flowserl-$1
  [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(fingerprint "$1")" ]]
}

usable_python() { # usable_python COMMAND: prints the interpreter behind it when it is a 3.12 that can make a venv
  "$1" -c 'import sys, venv, ensurepip
if sys.version_info[:2] != (3, 12): sys.exit(1)
print(getattr(sys, "_base_executable", "") or sys.executable)' 2>/dev/null
}

find_python() { # named by the user, on the path, pyenv's versions (its shim answers for one of them only), uv's
  local candidate
  for candidate in ${FLOWSERL_PYTHON:+"$FLOWSERL_PYTHON"} python3.12 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    usable_python "$candidate" && return
  done
  if command -v uv >/dev/null; then
    candidate=$(uv python find --no-project 3.12 2>/dev/null) && usable_python "$candidate" && return
  fi
  return 1
}

no_python() {
  local seen; seen=$(command -v python3.12 python3 python 2>/dev/null | tr '\n' ' ' || true)
  cat >&2 <<MESSAGE
bootstrap: FlowSERL needs Python 3.12 with its venv module; none found (looked at: ${seen:-no python on PATH}, pyenv, uv).
Install one in any of these ways and run the same command again:
  Ubuntu 24.04           sudo apt install python3.12 python3.12-venv python3.12-dev
  Ubuntu 20.04, 22.04    sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.12 python3.12-venv python3.12-dev
  any Linux, pyenv       pyenv install 3.12
  any Linux, uv          uv python install 3.12
Is there one already? Name it: FLOWSERL_PYTHON=/path/to/python3.12 bash start.sh
MESSAGE
  exit 2
}

check_disk() { # an install that fills the disk half way costs more than this question
  local need_mb=$1 free_kb
  free_kb=$(df -Pk "$root" | awk 'NR == 2 {print $4}')
  (( free_kb / 1024 >= need_mb )) ||
    die "installing the $kind environment takes about $need_mb MB, but only $((free_kb / 1024)) MB are free under $root; free some, or clone to a larger disk"
}

make_venv() {
  local python
  if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    python=$(find_python) || no_python
    say "making .venv with $python"
    "$python" -m venv --clear "$venv" || die "could not make $venv with $python (message above)"
  fi
  if ! "$venv/bin/uv" --version 2>/dev/null | grep -q "^uv $uv_version"; then
    say "installing uv $uv_version into .venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version" ||
      die "pip could not install uv (message above). Is there a network, or a package mirror in pip's configuration?"
  fi
}

pinned() { grep -m1 "^$1==" "$root/requirements/learner.txt" | cut -d' ' -f1; } # pinned NAME: NAME==VERSION, the learner's

# PyPI's torch for Linux is the CUDA build, 2.5 GB of it; uv knows where the CPU build is. Its hashes are not pinned.
install_torch() {
  local want; want=$(pinned torch)
  if "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' "${want#*==}" 2>/dev/null; then
    say "$want is there already"
    return
  fi
  say "installing the CPU build of $want"
  VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --torch-backend cpu --no-deps "$want" "$(pinned torchvision)" >&2 ||
    die "could not install the CPU build of $want from PyTorch's own index (message above). No way there from this network? Install any build of $want and $(pinned torchvision) into .venv and run this again: VIRTUAL_ENV=.venv .venv/bin/uv pip install $want $(pinned torchvision)"
}

install() {
  local need_mb=1000 hint="about 0.4 GB, some seconds to a minute" edit=() more=()
  if [[ $kind == learner ]]; then
    need_mb=8000 hint="about 6.4 GB with torch, half a minute to ten minutes by the network"; members+=(serl_launcher)
    [[ ! -d $venv/lib/python3.12/site-packages/torch ]] || need_mb=1000
  fi
  if [[ $kind == lerobot ]]; then
    need_mb=3000 hint="about 1.5 GB with torch's CPU build"; more=(--no-deps) # its list is whole, but for torch
  fi
  check_disk "$need_mb"
  rm -f "$venv"/.flowserl-*
  make_venv
  [[ $kind != lerobot ]] || install_torch
  say "installing the $kind environment from requirements/$kind.txt ($hint)"
  # The hashes are the protection; pip is the second try because it alone knows a mirror named in pip.conf.
  VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --require-hashes "${more[@]}" -r "$root/requirements/$kind.txt" >&2 || {
    say "uv failed (message above); trying pip, which also reads pip.conf"
    "$venv/bin/python" -m pip install --disable-pip-version-check --require-hashes "${more[@]}" -r "$root/requirements/$kind.txt" >&2
  } || die "could not install requirements/$kind.txt (message above); run the same command again to continue"
  for member in "${members[@]}"; do edit+=(-e "$root/$member"); done
  VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --quiet --offline --no-deps --no-build-isolation "${edit[@]}" >&2 ||
    die "could not install the workspace members (message above)"
  say "compiling what a run imports (half a minute, once)"
  env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" "$root/tools/compile_imports.py" "$kind" >&2 ||
    die "the $kind environment does not import (message above); remove .venv and run the same command again"
  fingerprint "$kind" > "$venv/.flowserl-$kind.new"
  mv "$venv/.flowserl-$kind.new" "$venv/.flowserl-$kind"
  say "ready: $venv"
}

[[ $kind == learner || $kind == actor || $kind == lerobot ]] ||
  die "unknown environment '$kind'; expected learner, actor or lerobot"
# A larger environment, even one whose pins moved on, stays what it is.
[[ $kind == actor && -e $venv/.flowserl-lerobot ]] && kind=lerobot
[[ $kind != learner && -e $venv/.flowserl-learner ]] && kind=learner
ready "$kind" && exit 0

# Two panes start together: the second waits for the first. The script itself is the lock file, so none is left behind.
if command -v flock >/dev/null; then
  exec 9<"${BASH_SOURCE[0]}"
  flock -n 9 || { say "another terminal is installing; waiting for it"; flock 9; }
  ready "$kind" && exit 0
fi
install
