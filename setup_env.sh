#!/usr/bin/env bash
# Make .venv: Python, the torch that runs on this machine, cargo if it is missing, and the project itself (editable).
# Returns at once if nothing has changed since the last time.
#
#   bash setup_env.sh                 everything that a run needs
#   bash setup_env.sh --dev           everything that the tests need too
#   bash setup_env.sh --print-torch   only print which torch it would install, best candidate first
#   bash setup_env.sh --print-sizes   the same with GB to download and GB on disk, separated by tabs
#
# NANOCHAT_LOCKED=1 installs exactly the packages of requirements.lock (all but torch), whose hashes pip compares.
# NANOCHAT_TORCH="torch==2.14.* --index-url https://download.pytorch.org/whl/cu126" overrides the choice.
# Nothing is installed outside this folder but Rust in ~/.cargo, and by the package manager only what you allow:
# NANOCHAT_INSTALL_SYSTEM=1 (CI=true counts as yes, at a terminal it asks).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"
STAMP="$VENV/nanochat-setup.stamp"
LOG="$ROOT/logs/setup_env.log"

PORTABLE="$VENV/portable" # PyPI's rustbpe, where ours could not be compiled
PIP_TMP="$VENV/tmp" # on the disk that has to hold torch anyway, and watched for the progress lines
REPORT_SECONDS=10
RUSTUP=1.28.2
PYTORCH_INDEX=https://download.pytorch.org/whl

NO_VENV=".venv can't be made: install Python's venv module (Debian, Ubuntu: apt install python3-venv); see $LOG"

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# --- this machine -----------------------------------------------------------------------------------------------------

# Lines "name,capability,MiB,driver", one per NVIDIA card; nothing without a card, "?" for an unknown capability.
cards() {
    local answer fields name
    command -v nvidia-smi > /dev/null || return 0
    for fields in name,compute_cap,memory.total,driver_version name,memory.total,driver_version; do
        answer="$(nvidia-smi "--query-gpu=$fields" --format=csv,noheader,nounits 2> /dev/null |
            grep -E ', *[0-9]+ *, *[0-9]+[.0-9]*$' |
            if [[ "$fields" == *compute_cap* ]]; then cat; else sed 's/, *\([0-9]* *, *[0-9.]*\)$/,?,\1/'; fi)" || continue
        printf '%s\n' "$answer"
        return
    done
}

# Candidates for `pip install`, best first: requirement, GB to download, GB on disk. nanochat/cards.py has the facts.
torch_candidates() {
    local python
    if [[ -n "${NANOCHAT_TORCH:-}" ]]; then
        printf '%s\n' "$NANOCHAT_TORCH"
        return
    fi
    python="$(find_python)" || python=python3
    cards | PYTHONPATH="$ROOT" "$python" -m nanochat.pipeline.card_checks torch
}

# Fails only if nothing can be installed from a server; other errors are pip's to explain.
reachable() {
    "$PYTHON" - "$1" << 'ASK' 2> /dev/null
import sys
import urllib.error
import urllib.request

try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=10)
except urllib.error.HTTPError:
    pass
ASK
}

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3.10 python3.14 python3; do
        if command -v "$name" > /dev/null &&
            "$name" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2> /dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
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

# MB in pip's temporary folders, or in the environment.
downloaded_mb() {
    { compgen -G "$PIP_TMP/pip-unpack-*" > /dev/null && du -ckL "$PIP_TMP"/pip-unpack-* 2> /dev/null; } |
        awk 'END { print int($1 * 1.024e-3) }'
}

# Until killed: every ten seconds one line with what has come, how fast, and how long the rest takes. $1: MB to come.
report_progress() {
    local wanted="$1" before=0 now installed text
    while kill -0 "$$" 2> /dev/null; do
        sleep "$REPORT_SECONDS" > /dev/null 2>&1
        now="$(downloaded_mb)"
        text="$(awk -v now="$now" -v before="$before" -v wanted="$wanted" -v seconds="$REPORT_SECONDS" 'BEGIN {
            speed = (now - before) / seconds
            if (speed < 0.1) exit
            printf "%d MB downloaded", now
            if (wanted > now) printf " of about %d", wanted
            printf ", %.1f MB/s", speed
            if (wanted > now) printf ", about %d s left", (wanted - now) / speed
        }')"
        if [[ -z "$text" ]]; then
            installed="$(du -sk "$VENV" 2> /dev/null | awk '{ print int($1 * 1.024e-3) }')"
            text="working: ${installed:-0} MB in .venv; $(tail -n 1 "$LOG" | cut -c 1-60)"
        fi
        before="$now"
        printf '\nsetup:   %s' "$text"
    done
}

# step TEXT COMMAND...: run a command with its output in the log, and print one line with its time; more if it takes long.
step() {
    local text="$1" start=$SECONDS watcher failed=no
    shift
    printf 'setup: %s ... ' "$text"
    printf '\n$ %s\n' "$*" >> "$LOG"
    # The watcher is in the background, not the command: Ctrl-C must reach that.
    report_progress "${WANTED_MB:-0}" &
    watcher=$!
    "$@" >> "$LOG" 2>&1 || failed=yes
    kill "$watcher" 2> /dev/null || true
    wait "$watcher" 2> /dev/null || true
    ((SECONDS - start < REPORT_SECONDS)) || printf '\nsetup:   ' # after lines of the watcher
    if [[ "$failed" == yes ]]; then
        printf 'failed after %s s\n' "$((SECONDS - start))"
        return 1
    fi
    printf '%s s\n' "$((SECONDS - start))"
}

pip_install() {
    mkdir -p "$PIP_TMP"
    TMPDIR="$PIP_TMP" "$PYTHON" -m pip install --no-input "$@"
}

# A requirement with its options, as torch_candidates prints it. --upgrade replaces a build for another device.
install_torch() {
    local words
    read -ra words <<< "$1"
    pip_install --upgrade "${words[@]}"
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
    "$PYTHON" -c 'import sys, pip; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2> /dev/null
}

# The installed build of torch, as torch-2.14.0+cu126: one that a later pip install brought may lack kernels for the card.
torch_here() {
    local folders
    folders="$(compgen -G "$VENV/lib/python3*/site-packages/torch-*.dist-info" | head -n 1)"
    folders="${folders##*/}"
    printf '%s' "${folders%.dist-info}"
}

# A quick check that the packages are still installed; importing them would take seconds.
is_complete() {
    # A compiler that has come meanwhile replaces PyPI's rustbpe.
    venv_works && { compgen -G "$ROOT/rustbpe/_rustbpe*" || { [[ -d "$PORTABLE" ]] && ! rust_works; }; } > /dev/null &&
        "$PYTHON" -c 'import importlib.util as u; assert all(map(u.find_spec, ("torch", "pyarrow", "tyro")))' 2> /dev/null
}

# True if there is a linker, and a rustc new enough for rustbpe.
rust_works() {
    local wanted have
    { command -v cc || command -v gcc || command -v clang; } > /dev/null || return 1
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

# The package manager changes the whole system: only with a yes.
may_install_system() {
    local answer
    if [[ -n "${NANOCHAT_INSTALL_SYSTEM:-}" ]]; then
        [[ "$NANOCHAT_INSTALL_SYSTEM" == 1 ]]
    elif [[ "${CI:-}" == true ]]; then
        return 0
    elif [[ -t 0 && -t 1 ]]; then
        printf 'setup: install cargo and gcc for the whole system, by its package manager? [y/N] '
        read -r answer && [[ "$answer" == [yYjJ]* ]]
    else
        return 1
    fi
}

install_system_rust() {
    if command -v brew > /dev/null; then
        brew install rust
    elif command -v apt-get > /dev/null; then
        as_root apt-get update || true
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y cargo gcc
    elif command -v dnf > /dev/null; then
        as_root dnf install -y cargo gcc
    elif command -v pacman > /dev/null; then
        as_root pacman -S --noconfirm rust gcc
    elif command -v apk > /dev/null; then
        as_root apk add cargo gcc musl-dev
    fi
    hash -r
    rust_works
}

# rustup's installer of one version, whose checksum stands here; into the home folder, PATH stays as it is.
install_rustup() {
    local host sum installer="$PIP_TMP/rustup-init"
    case "$(uname -s) $(uname -m)" in
        "Linux x86_64") host=x86_64-unknown-linux-gnu sum=20a06e644b0d9bd2fbdbfd52d42540bdde820ea7df86e92e533c073da0cdd43c ;;
        "Linux aarch64") host=aarch64-unknown-linux-gnu sum=e3853c5a252fca15252d07cb23a1bdd9377a8c6f3efa01531109281ae47f841c ;;
        *) return 1 ;;
    esac
    mkdir -p "$PIP_TMP"
    curl --proto '=https' --tlsv1.2 --fail --silent --show-error --connect-timeout 20 --output "$installer" \
        "https://static.rust-lang.org/rustup/archive/$RUSTUP/$host/rustup-init" || return 1
    if [[ "$(hash_stdin < "$installer")" != "$sum" ]]; then
        echo "the checksum of rustup-init $RUSTUP is wrong: not run"
        return 1
    fi
    chmod +x "$installer"
    "$installer" -y --profile minimal --no-modify-path || return 1
    # An older cargo elsewhere must not hide the new one.
    export PATH="$HOME/.cargo/bin:$PATH"
    hash -r
    rust_works
}

# Without a compiler the run goes on, see rustbpe/portable.py.
find_rust() {
    rust_works && return
    if { command -v cc || command -v gcc || command -v clang; } > /dev/null &&
        step "installing Rust into ~/.cargo, by rustup $RUSTUP" install_rustup; then
        return
    fi
    if { can_be_root || command -v brew > /dev/null; } && may_install_system &&
        step "installing Rust by the package manager" install_system_rust; then
        return
    fi
    echo "setup: no Rust compiler: PyPI's rustbpe will train the tokenizer (the same merges) and tiktoken encode (the" \
        "same ids, several times slower); a public corpus is learned without --recall. Install cargo and gcc, then run" \
        "this again, for ours"
}

install_portable_rustbpe() {
    pip_install --no-deps --upgrade --target "$PORTABLE" rustbpe==0.1.0
}

# Import torch, compare its kernels with the cards, compute something. $1: number of cards that nvidia-smi sees.
prove_torch() {
    (cd "$ROOT" && "$PYTHON" - "$1") << 'PROOF'
import os
import sys

import torch

from nanochat.cards import OLDEST
from nanochat.common import check_wheel

hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
cards = 0 if hidden else int(sys.argv[1])
print("torch", torch.__version__, "CUDA", torch.version.cuda)
if cards and torch.version.cuda and not torch.cuda.is_available():
    sys.exit(f"{cards} cards here, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds none: the driver is too old or too new")
if cards and not torch.version.cuda:
    sys.exit(f"{cards} cards here, but torch {torch.__version__} is a build for CPUs")
usable = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) >= OLDEST]
check_wheel(usable)
for device in [f"cuda:{i}" for i in usable] or ["cpu"]:
    a = torch.arange(64.0, device=device).reshape(8, 8)
    if (a @ torch.eye(8, device=device) != a).any():
        sys.exit(f"a matmul on {device} gives wrong results")
    print("matmul works on", device)
PROOF
}

# An old card's torch has no successor: `pip install -U` in .venv must not put a build without its kernels in its place.
hold_torch() {
    local version
    [[ "$1" == *cu126* || "$1" == torch==2.7.1 ]] || return 0
    version="$("$PYTHON" -c 'import torch; print(torch.__version__)')"
    printf 'torch==%s\n' "$version" > "$VENV/constraints.txt"
    printf '[install]\nconstraint = %s\n' "$VENV/constraints.txt" > "$VENV/pip.conf"
    echo "setup: torch $version is held in .venv (pip.conf there): newer ones have no kernels for this card"
}

install_project() {
    local extras="$1"
    if [[ "${NANOCHAT_LOCKED:-}" == 1 ]]; then
        step "installing the locked packages" pip_install --require-hashes --no-deps -r "$ROOT/requirements.lock" || return 1
    fi
    step "installing the project and what it needs, building rustbpe" pip_install -e "$ROOT$extras" || return 1
    if compgen -G "$ROOT/rustbpe/_rustbpe*" > /dev/null; then
        rm -rf "$PORTABLE"
        # The tests compare it with ours; without it they play it.
        [[ -z "$extras" ]] || step "installing PyPI's rustbpe" install_portable_rustbpe || true
        return
    fi
    ! rust_works || echo "setup: rustbpe could not be compiled (see $LOG): PyPI's takes its place, more slowly;" \
        "a public corpus is learned without --recall"
    step "installing PyPI's rustbpe" install_portable_rustbpe
}

# Try one torch after another until one is shown to run here. Sizes are said before anything is downloaded.
install_and_prove() {
    local extras="$1" num_cards="$2" candidate download disk
    rm -f "$VENV/pip.conf"
    while IFS=$'\t' read -r -u 3 candidate download disk; do
        if [[ "$candidate" == *"$PYTORCH_INDEX"* && -z "${NANOCHAT_TORCH:-}" ]] && ! reachable "$PYTORCH_INDEX/"; then
            # A folder of wheels may still have it; the wrong build from PyPI must not come in its place.
            [[ "$candidate" == *--extra-index-url* || -n "${PIP_FIND_LINKS:-}" ]] || continue
            candidate="${candidate%% --*}"
            echo "setup: $PYTORCH_INDEX does not answer: without it, a build for this machine is looked for elsewhere"
        fi
        [[ -z "$download" ]] ||
            echo "setup: $candidate and the rest: about $download GB to download, $disk GB on disk when done"
        if WANTED_MB="$(awk -v gb="${download:-0}" 'BEGIN { print int(gb * 1000) }')" step "installing $candidate" install_torch "$candidate" &&
            install_project "$extras" &&
            step "proving that this torch runs here" prove_torch "$num_cards"; then
            hold_torch "$candidate"
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
        "(nvidia-smi shows yours), Python 3.10 to 3.14, and: NANOCHAT_TORCH='torch==2.14.* --index-url $PYTORCH_INDEX/cu126' bash setup_env.sh"
}

main() {
    local extras="" wanted python num_cards fresh=no
    case "${1:-}" in
        "") ;;
        --dev) extras="[dev]" ;;
        --print-torch)
            torch_candidates | cut -f 1
            return
            ;;
        --print-sizes)
            torch_candidates
            return
            ;;
        *) die "unknown option $1 (there are --dev, --print-torch and --print-sizes)" ;;
    esac
    export PATH="$PATH:$HOME/.cargo/bin"
    wanted="$(wanted_stamp)"
    if [[ -f "$STAMP" && "$(< "$STAMP")" == "$wanted $(torch_here) "*"$extras" ]] && is_complete; then
        return
    fi
    python="$(find_python)" ||
        die "no Python 3.10 to 3.14 with its venv module found: install one (Debian, Ubuntu: apt install python3 python3-venv)"
    if [[ -z "$(cards)" && -z "${NANOCHAT_TORCH:-}" ]]; then
        PYTHONPATH="$ROOT" "$python" -m nanochat.pipeline.card_checks other |
            while IFS=$'\t' read -r status _ text remedy; do
                [[ "$status" != warn ]] || echo "setup: $text; $remedy. Going on for the CPU"
            done
    fi
    mkdir -p "$ROOT/logs"
    : > "$LOG"
    rm -f "$STAMP"
    find_rust
    num_cards="$(cards | sed 's/,[^,]*$//' | PYTHONPATH="$ROOT" "$python" -m nanochat.cards | sed -n 1p | wc -w)"
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
    rm -rf "$PIP_TMP"
    printf '%s %s %s\n' "$wanted" "$(torch_here)" "$extras" > "$STAMP"
    printf 'setup: done in %s s\n' "$SECONDS"
}

main "$@"
