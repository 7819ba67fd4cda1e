#!/usr/bin/env bash
# Make .venv: Python, the torch that runs on this machine, cargo if it is missing, and the project itself (editable).
# Returns at once if nothing has changed since the last time.
#
#   bash setup_env.sh                 everything that a run needs
#   bash setup_env.sh --dev           everything that the tests need too
#   bash setup_env.sh --print-torch   only print which torch it would install, best candidate first
#
# NANOCHAT_TORCH="torch==2.14.* --index-url https://download.pytorch.org/whl/cu126" overrides the choice.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"
STAMP="$VENV/nanochat-setup.stamp"
LOG="$ROOT/logs/setup_env.log"

PYTORCH_INDEX="https://download.pytorch.org/whl"
TORCH_CPU="torch==2.13.0 --extra-index-url $PYTORCH_INDEX/cpu"
TORCH_ANY="torch>=2.7,<2.15"
# The last builds with kernels for cards older than capability 7.5, and for drivers older than 580.
TORCH_CU126="torch==2.14.* --index-url $PYTORCH_INDEX/cu126"
TORCH_OLD="torch==2.7.1"

NO_VENV=".venv can't be made: install Python's venv module (Debian, Ubuntu: apt install python3-venv); see $LOG"

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# --- this machine -----------------------------------------------------------------------------------------------------

# Lines "capability driver" (such as "6.0 535.104.05"), one per NVIDIA card; nothing without a card. The capability is
# "unknown" if nvidia-smi is too old to report it; its driver is then old as well, which leads to the same choice.
cards() {
    local answer driver
    command -v nvidia-smi > /dev/null || return 0
    if answer="$(nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2> /dev/null)" &&
        [[ "$answer" =~ ^[0-9]+\.[0-9]+, ]]; then
        tr -d ',' <<< "$answer"
    elif answer="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null)" &&
        [[ "$answer" =~ ^[0-9]+\. ]]; then
        while read -r driver; do printf 'unknown %s\n' "$driver"; done <<< "$answer"
    fi
}

# Candidates for `pip install`, one per line, best first.
torch_candidates() {
    local capability driver old=no any=no
    if [[ -n "${NANOCHAT_TORCH:-}" ]]; then
        printf '%s\n' "$NANOCHAT_TORCH"
        return
    fi
    while read -r capability driver; do
        any=yes
        # 7.5 as 75, 10.0 as 100: whole numbers compare in bash.
        if [[ "$capability" == unknown || "${capability/./}" -lt 75 || "${driver%%.*}" -lt 580 ]]; then
            old=yes
        fi
    done < <(cards)
    if [[ "$any" == no ]]; then
        printf '%s\n' "$TORCH_CPU" "torch==2.13.0" "$TORCH_ANY"
    elif [[ "$old" == yes ]]; then
        printf '%s\n' "$TORCH_CU126" "$TORCH_OLD"
    else
        printf '%s\n' "$TORCH_ANY" "$TORCH_CU126" "$TORCH_OLD"
    fi
}

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3.10 python3; do
        if command -v "$name" > /dev/null &&
            "$name" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2> /dev/null; then
            command -v "$name"
            return
        fi
    done
    die "no Python 3.10 to 3.13 with its venv module found: install one (Debian, Ubuntu: apt install python3 python3-venv)"
}

hash_stdin() {
    if command -v sha256sum > /dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

# A hash of everything that the environment is made from.
wanted_stamp() {
    {
        torch_candidates
        cd "$ROOT"
        pwd # an environment that was moved points to its old folder
        cat pyproject.toml setup_env.sh
        find rustbpe -path rustbpe/target -prune -o -type f \( -name '*.rs' -o -name 'Cargo.*' \) -print |
            LC_ALL=C sort | while read -r file; do printf '%s\n' "$file" && cat "$file"; done
    } | hash_stdin
}

# --- steps ------------------------------------------------------------------------------------------------------------

# step TEXT COMMAND...: run a command with its output in the log, and print one line with its time.
step() {
    local text="$1" start=$SECONDS
    shift
    printf 'setup: %s ... ' "$text"
    printf '\n$ %s\n' "$*" >> "$LOG"
    if "$@" >> "$LOG" 2>&1; then
        printf '%s s\n' "$((SECONDS - start))"
    else
        printf 'failed after %s s\n' "$((SECONDS - start))"
        return 1
    fi
}

# A requirement with its options, as torch_candidates prints it. --upgrade replaces a build for another device.
install_torch() {
    local words
    read -ra words <<< "$1"
    "$PYTHON" -m pip install --no-input --upgrade "${words[@]}"
}

# Some systems (Colab, plain Debian) have venv without ensurepip; then a pip outside installs pip, or uv does.
make_venv() {
    local python="$1"
    rm -rf "$VENV"
    "$python" -m venv "$VENV" && return
    rm -rf "$VENV"
    "$python" -m venv --without-pip "$VENV" && "$python" -m pip --python "$PYTHON" install --no-input pip && return
    rm -rf "$VENV"
    command -v uv && uv venv --seed --python "$python" "$VENV"
}

venv_works() {
    "$PYTHON" -c 'import sys, pip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2> /dev/null
}

# A quick check that the packages are still installed; importing them would take seconds.
is_complete() {
    venv_works && compgen -G "$ROOT/rustbpe/_rustbpe*" > /dev/null &&
        "$PYTHON" -c 'import importlib.util as u; assert all(map(u.find_spec, ("torch", "pyarrow", "tyro")))' 2> /dev/null
}

# True if rustc is installed and new enough for rustbpe.
rust_works() {
    local wanted have
    command -v cargo > /dev/null || return 1
    wanted="$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/rustbpe/Cargo.toml")"
    have="$(rustc --version 2> /dev/null | sed -n 's/^rustc \([0-9][0-9.]*\).*/\1/p')"
    [[ -n "$have" && "$(printf '%s\n' "${wanted:-1.0}" "$have" | sort -V | head -n 1)" == "${wanted:-1.0}" ]]
}

can_be_root() {
    [[ "$(id -u)" == 0 ]] || { command -v sudo > /dev/null && sudo -n true 2> /dev/null; }
}

as_root() {
    if [[ "$(id -u)" == 0 ]]; then "$@"; else sudo -n "$@"; fi
}

# With the package manager if root (or sudo without a password), else with rustup in the home folder.
install_rust() {
    if can_be_root; then
        if command -v apt-get > /dev/null; then
            as_root apt-get update || true
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y cargo gcc || true
        elif command -v dnf > /dev/null; then
            as_root dnf install -y cargo gcc || true
        elif command -v pacman > /dev/null; then
            as_root pacman -S --noconfirm rust gcc || true
        elif command -v apk > /dev/null; then
            as_root apk add cargo gcc musl-dev || true
        fi
    elif command -v brew > /dev/null; then
        brew install rust || true
    fi
    hash -r
    rust_works && return
    # An older cargo elsewhere must not hide the new one.
    export PATH="$HOME/.cargo/bin:$PATH"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --no-modify-path
    hash -r
    rust_works
}

# Import torch, compare its kernels with the cards, compute something. $1: number of cards that nvidia-smi sees.
prove_torch() {
    (cd "$ROOT" && "$PYTHON" - "$1") << 'PROOF'
import os
import sys

import torch

from nanochat.common import check_wheel

hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
cards = 0 if hidden else int(sys.argv[1])
print("torch", torch.__version__, "CUDA", torch.version.cuda)
if cards and torch.version.cuda and not torch.cuda.is_available():
    sys.exit(f"{cards} cards here, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds none: the driver is too old or too new")
if cards and not torch.version.cuda:
    sys.exit(f"{cards} cards here, but torch {torch.__version__} is a build for CPUs")
check_wheel()
for device in [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]:
    a = torch.arange(64.0, device=device).reshape(8, 8)
    if (a @ torch.eye(8, device=device) != a).any():
        sys.exit(f"a matmul on {device} gives wrong results")
    print("matmul works on", device)
PROOF
}

# Try one torch after another until one is shown to run here.
install_and_prove() {
    local extras="$1" num_cards="$2" candidate
    while read -r -u 3 candidate; do
        if step "installing $candidate" install_torch "$candidate" &&
            step "installing the project and what it needs, building rustbpe" \
                "$PYTHON" -m pip install --no-input -e "$ROOT$extras" &&
            step "proving that this torch runs here" prove_torch "$num_cards"; then
            return
        fi
        tail -n 1 "$LOG"
    done 3< <(torch_candidates)
    return 1
}

give_up() {
    tail -n 5 "$LOG" >&2
    if [[ "$1" == 0 ]]; then
        die "this environment could not be installed: the lines above and $LOG say why. Without a network, point pip to a" \
            "folder of wheels (PIP_FIND_LINKS); another torch can be named: NANOCHAT_TORCH='torch==2.13.0'"
    fi
    die "no torch could be installed that runs on this card (see $LOG). A P100 or V100 needs a driver of 525.60 to 580" \
        "(nvidia-smi shows yours), Python 3.10 to 3.13, and: NANOCHAT_TORCH='$TORCH_CU126' bash setup_env.sh"
}

main() {
    local extras="" wanted python num_cards fresh=no
    case "${1:-}" in
        "") ;;
        --dev) extras="[dev]" ;;
        --print-torch)
            torch_candidates
            return
            ;;
        *) die "unknown option $1 (there are --dev and --print-torch)" ;;
    esac
    wanted="$(wanted_stamp)"
    if [[ -f "$STAMP" && "$(< "$STAMP")" == "$wanted"*"$extras" ]] && is_complete; then
        return
    fi
    python="$(find_python)"
    mkdir -p "$ROOT/logs"
    : > "$LOG"
    rm -f "$STAMP"
    export PATH="$PATH:$HOME/.cargo/bin"
    if ! rust_works; then
        step "installing Rust" install_rust ||
            die "no Rust compiler could be installed: install cargo (https://rustup.rs) and run this again; see $LOG"
    fi
    num_cards="$(cards | wc -l)"
    if ! venv_works; then
        fresh=yes
        step "making .venv with $python" make_venv "$python" || die "$NO_VENV"
    fi
    if ! install_and_prove "$extras" "$((num_cards))"; then
        # Leftovers of an earlier, interrupted set-up may be in the way.
        [[ "$fresh" == no ]] || give_up "$((num_cards))"
        step "making .venv again with $python" make_venv "$python" || die "$NO_VENV"
        install_and_prove "$extras" "$((num_cards))" || give_up "$((num_cards))"
    fi
    printf '%s %s\n' "$wanted" "$extras" > "$STAMP"
    printf 'setup: done in %s s\n' "$SECONDS"
}

main "$@"
