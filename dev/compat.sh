#!/usr/bin/env bash
# Runs the tests with the oldest and the newest torch that the project supports, on the CPU.
#
#   bash dev/compat.sh                  torch 2.7.1 and 2.14.1
#   bash dev/compat.sh 2.9.1            another one
#   PYTEST="-k precision" bash dev/compat.sh
#
# Each version gets a throw-away environment with the default wheel of the package index, which brings several gigabytes
# of CUDA libraries, and a copy of the tracked files. Needs about 10 GB in $TMPDIR at a time, a Rust compiler and
# Python 3.10 to 3.13 ($PYTHON, default python3).
set -euo pipefail

cd "$(dirname "$0")/.."
versions=("$@")
[[ ${#versions[@]} -gt 0 ]] || versions=(2.7.1 2.14.1)
folder=$(mktemp -d -t nanochat-compat-XXXXXX)
trap 'rm -rf "$folder"' EXIT
read -ra pytest_flags <<<"${PYTEST:-}"

# Install in a folder and test there, as a chain of &&: `set -e` has no effect in a function that is followed by ||.
check() {
    local torch=$1 work=$folder/$1
    local python=$work/env/bin/python
    mkdir -p "$work/src" &&
        git ls-files -z | xargs -0 cp --parents -t "$work/src" &&
        "${PYTHON:-python3}" -m venv "$work/env" &&
        echo "torch==$torch" >"$work/constraints.txt" &&
        "$python" -m pip install -q -q --no-cache-dir --disable-pip-version-check \
            -c "$work/constraints.txt" -e "$work/src[dev]" &&
        cd "$work/src" &&
        "$python" -c 'import torch; print("torch", torch.__version__, "with CUDA", torch.version.cuda)' &&
        "$python" -m pytest -q -p no:cacheprovider --numprocesses=auto --dist=loadfile "${pytest_flags[@]}"
}

failed=()
for torch in "${versions[@]}"; do
    echo "== torch $torch"
    (check "$torch") || failed+=("$torch")
    rm -rf "${folder:?}/$torch"
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "FAILED with torch ${failed[*]}"
    exit 1
fi
echo "ok with torch ${versions[*]}"
