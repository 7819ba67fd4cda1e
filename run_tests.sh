#!/usr/bin/env bash
# Check everything that must hold before a commit: style, types, Rust, tests. Arguments go to pytest:
#   bash run_tests.sh -k tokenizer
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
export PATH="$PATH:$HOME/.cargo/bin"
PYTHON=.venv/bin/python

# check NAME COMMAND...: run one check, print its output only if it fails, and its time.
check() {
    local name="$1" start=$SECONDS output
    shift
    if output="$("$@" 2>&1)"; then
        printf '%s: ok (%s s)\n' "$name" "$((SECONDS - start))"
    else
        printf '%s\n%s: FAILED, by: %s\n' "$output" "$name" "$*" >&2
        exit 1
    fi
}

# A distribution's cargo may come without these tools; they are used if they are installed.
check_rust() {
    local manifest=(--manifest-path rustbpe/Cargo.toml)
    if cargo fmt --version > /dev/null 2>&1; then
        check "cargo fmt" cargo fmt "${manifest[@]}" --check
    else
        echo "cargo fmt: not installed, skipped"
    fi
    if cargo clippy --version > /dev/null 2>&1; then
        check "cargo clippy" cargo clippy -q "${manifest[@]}" --all-targets -- -D warnings
    else
        echo "cargo clippy: not installed, skipped"
    fi
    check "cargo test" cargo test -q "${manifest[@]}"
}

bash setup_env.sh --dev
# The clients of tests/test_clients.py; without them (no network, no npm) those tests are skipped.
bash tests/clients/setup.sh || echo "clients: not installed, their tests are skipped"
check "ruff check" "$PYTHON" -m ruff check .
check "ruff format" "$PYTHON" -m ruff format --check .
check "mypy" "$PYTHON" -m mypy
if command -v shellcheck > /dev/null; then
    check "shellcheck" shellcheck ./*.sh .ci/run
fi
check_rust
# One process per core; the tests of a file share its fixtures.
exec "$PYTHON" -m pytest --numprocesses=auto --dist=loadfile "$@"
