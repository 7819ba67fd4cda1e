#!/usr/bin/env bash
# Will a run work on this machine? Looks, changes nothing; needs bash only. Exit 0: yes; 1: no, and the ✗ lines say why.
#   bash verify_p100_setup.sh
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
HUB="${HF_ENDPOINT:-https://huggingface.co}"
problems=0

good() { printf '✓ %s\n' "$*"; }
warn() { printf '⚠ %s\n' "$*"; }
bad() {
    printf '✗ %s\n' "$*"
    problems=$((problems + 1))
}

# One line per card: name, memory in MiB, driver, capability ("" where nvidia-smi is too old to know it).
list_cards() {
    command -v nvidia-smi > /dev/null || return 0
    nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader,nounits 2> /dev/null |
        grep -E '^[^,]+, [0-9]+,' ||
        nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader,nounits 2> /dev/null |
        grep -E '^[^,]+, [0-9]+,' || true
}

check_card() {
    local name="$1" memory_mib="$2" driver="$3" capability="$4"
    good "card: $name, capability ${capability:-unknown}, $memory_mib MiB, driver $driver"
    if [[ "${driver%%.*}" -lt 525 ]]; then
        bad "driver $driver is older than 525.60, which CUDA 12.6 needs: install driver 580 (the last one for P100 and V100)"
    fi
    case "$name" in
        *P100* | *V100* | *P40* | *P4)
            [[ "${driver%%.*}" -lt 590 ]] || bad "driver $driver does not drive this card: 580 is the last branch that does"
            ;;
    esac
    if [[ "$memory_mib" -lt 15000 ]]; then
        warn "$memory_mib MiB: the p100 profile is sized for 16 GB. Try DEPTH=8, or a smaller --device_batch_size"
    fi
    if [[ -n "$capability" && "${capability%%.*}" -lt 6 ]]; then
        bad "capability $capability: no torch that this project supports has kernels for cards before 6.0 (Pascal)"
    fi
}

check_cards() {
    local line name memory driver capability count=0
    while IFS= read -r line; do
        [[ -n "$line" ]] || continue
        IFS=, read -r name memory driver capability <<< "$line"
        check_card "$name" "${memory// /}" "${driver// /}" "${capability// /}"
        count=$((count + 1))
    done <<< "$(list_cards)"
    [[ "$count" -gt 0 ]] && return
    if command -v nvidia-smi > /dev/null; then
        warn "nvidia-smi is there but shows no card: if this machine has one, look at its driver (P100, V100: at most 580)"
    fi
    good "no CUDA card: the demo will run, on the CPU, and needs none"
    return 1
}

check_memory() {
    local needed_gib="$1" have_kib have_gib
    have_kib="$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo 2> /dev/null || true)"
    [[ -n "$have_kib" ]] || have_kib="$(($(sysctl -n hw.memsize 2> /dev/null || echo 0) / 1024))"
    have_gib=$((have_kib / 1024 / 1024))
    if [[ "$have_kib" -eq 0 ]]; then
        warn "memory: can't be read here; this run wants $needed_gib GiB"
    elif [[ "$((have_gib + 1))" -lt "$needed_gib" ]]; then # a "16 GB" machine shows a bit less
        warn "memory: $have_gib GiB; $needed_gib GiB are wanted, so close other programs"
    else
        good "memory: $have_gib GiB"
    fi
}

check_disk() {
    local needed_gib="$1" folder="$2" what="$3" free_kib
    while [[ ! -d "$folder" ]]; do folder="$(dirname "$folder")"; done
    free_kib="$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')"
    if [[ "$((free_kib / 1024 / 1024))" -lt "$needed_gib" ]]; then
        bad "disk: $((free_kib / 1024 / 1024)) GiB free in $folder, $what wants $needed_gib GiB: free some space, or put it on" \
            "another disk (data and models: NANOCHAT_BASE_DIR=/big/disk)"
    else
        good "disk: $((free_kib / 1024 / 1024)) GiB free in $folder for $what"
    fi
}

check_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3.10 python3; do
        if command -v "$name" > /dev/null &&
            "$name" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2> /dev/null; then
            good "Python: $("$name" --version 2>&1), with venv"
            return
        fi
    done
    bad "no Python 3.10 to 3.13 with its venv module: install one (Debian, Ubuntu: apt install python3 python3-venv)"
}

reachable() {
    if command -v curl > /dev/null; then
        curl --silent --head --max-time 10 --output /dev/null "$1"
    else
        python3 -c 'import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1], method="HEAD"), timeout=10)' "$1" \
            > /dev/null 2>&1
    fi
}

check_environment() {
    if [[ -f "$ROOT/.venv/nanochat-setup.stamp" ]]; then
        good "environment: set up in .venv ($("$ROOT/.venv/bin/python" -c \
            'import importlib.metadata as m; print("torch", m.version("torch"))' 2> /dev/null || echo "broken, will be rebuilt"))"
    else
        good "environment: not set up yet; setup_env.sh will install $(bash "$ROOT/setup_env.sh" --print-torch | head -n 1)"
        command -v cargo > /dev/null || [[ -x "$HOME/.cargo/bin/cargo" ]] ||
            warn "Rust: no cargo here; setup_env.sh will try to install it (package manager or rustup)"
    fi
}

check_data() {
    if [[ -n "${DATA_DIR:-}" ]]; then
        if [[ -e "$DATA_DIR" ]]; then good "data: $DATA_DIR"; else bad "DATA_DIR=$DATA_DIR does not exist: correct it"; fi
    elif reachable "$HUB"; then
        good "network: $HUB answers"
    else
        bad "network: $HUB does not answer, so no public text can be downloaded: check the network, set HF_ENDPOINT to a" \
            "mirror, or set DATA_DIR to text of your own"
    fi
}

check_python
if check_cards; then
    check_memory 16
    check_disk 20 "$BASE_DIR" "data and models"
    check_disk 10 "$ROOT" "the environment"
    check_data
    good "a P100 preset run is planned; these scripts have not been run on a physical P100 yet"
else
    check_memory 4
    check_disk 2 "$BASE_DIR" "data and models"
    check_disk 3 "$ROOT" "the environment"
fi
check_environment
if [[ "$problems" -gt 0 ]]; then
    echo "$problems problem(s): solve the ✗ lines, then run this again"
    exit 1
fi
echo "ready: bash speedrun_p100.sh"
