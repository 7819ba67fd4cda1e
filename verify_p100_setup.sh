#!/usr/bin/env bash
# Check whether a run will work on this machine; changes nothing. Needs bash; after `bash setup_env.sh` it tests torch too.
#   bash verify_p100_setup.sh           ✓ good, ⚠ works, but …, ✗ will not work; → what to do
#   bash verify_p100_setup.sh --json    the same for programs
# Exit 0: a run will work; 1: it won't, and the ✗ lines say why; 2: an unknown option.
# The run's own settings count: PROFILE DATA_DIR CHAT_DATA DATASET HOURS NANOCHAT_BASE_DIR HF_ENDPOINT CUDA_VISIBLE_DEVICES.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV_PYTHON="$ROOT/.venv/bin/python"
BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
HUB="${HF_ENDPOINT:-https://huggingface.co}"
CGROUP_LIMIT=/sys/fs/cgroup/memory.max
JSON=no

STATUSES=() NAMES=() TEXTS=() REMEDIES=()
problems=0 plan="" python="" gpus=""

# --- output -----------------------------------------------------------------------------------------------------------

# report ok|warn|fail NAME TEXT [REMEDY]
report() {
    local status="$1" name="$2" text="$3" remedy="${4:-}" sign="✓"
    case "$status" in warn) sign="⚠" ;; fail) sign="✗" ;; esac
    [[ "$status" != fail ]] || problems=$((problems + 1))
    STATUSES+=("$status") NAMES+=("$name") TEXTS+=("$text") REMEDIES+=("$remedy")
    [[ "$JSON" == yes ]] && return
    printf '%s %s: %s\n' "$sign" "$name" "$text"
    [[ -z "$remedy" ]] || printf '    → %s\n' "$remedy"
}

# A JSON string. Control characters become spaces, bytes that are not UTF-8 are dropped.
json_string() {
    local text="$1"
    text="${text//\\/\\\\}"
    text="${text//\"/\\\"}"
    text="$(printf '%s' "$text" | tr '\000-\037\177' ' ')"
    if command -v iconv > /dev/null; then
        text="$(printf '%s' "$text" | iconv -c -f UTF-8 -t UTF-8)" || true
    else
        text="$(printf '%s' "$text" | LC_ALL=C tr -d '\200-\377')"
    fi
    printf '"%s"' "$text"
}

print_json() {
    local i comma=""
    printf '{"ready": %s, "plan": %s, "problems": %s, "checks": [' \
        "$([[ "$problems" == 0 ]] && echo true || echo false)" "$(json_string "$plan")" "$problems"
    for i in "${!NAMES[@]}"; do
        printf '%s\n  {"status": "%s", "name": %s, "text": %s, "remedy": %s}' "$comma" "${STATUSES[i]}" \
            "$(json_string "${NAMES[i]}")" "$(json_string "${TEXTS[i]}")" "$(json_string "${REMEDIES[i]}")"
        comma=","
    done
    printf '\n]}\n'
}

# --- Python and what it installs --------------------------------------------------------------------------------------

# The first Python that setup_env.sh would take, in $python; it must be able to make an environment with pip.
check_python() {
    local name found="" able='import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'
    for name in python3.13 python3.12 python3.11 python3.10 python3; do
        command -v "$name" > /dev/null || continue
        "$name" -c '' 2> /dev/null || continue # a shim without a Python behind it
        found="$found${found:+, }$("$name" --version 2>&1)"
        if "$name" -c "$able" 2> /dev/null; then
            python="$name"
            break
        fi
    done
    if [[ -z "$python" ]]; then
        report fail python "no Python 3.10 to 3.13 with its venv module (here: ${found:-none})" \
            "install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; else https://docs.astral.sh/uv: uv python install 3.12)"
        return
    fi
    report ok python "$("$python" --version 2>&1)"
    if [[ -x "$VENV_PYTHON" ]]; then
        return
    elif "$python" -c 'import ensurepip' 2> /dev/null; then
        report ok installer "venv with pip"
    elif "$python" -m pip --version > /dev/null 2>&1; then
        report ok installer "venv, and a pip outside that can fill it"
    elif command -v uv > /dev/null; then
        report ok installer "uv"
    else
        report fail installer "$python can't make an environment with pip (no ensurepip, no pip, no uv)" \
            "Debian, Ubuntu: apt install ${python}-venv; else install uv (https://docs.astral.sh/uv)"
    fi
}

# True if a server answers at all; an HTTP error is an answer too.
reachable() {
    if command -v curl > /dev/null; then
        curl --silent --head --location --max-time 10 --output /dev/null "$1"
    elif [[ -n "$python" ]]; then
        "$python" - "$1" > /dev/null 2>&1 << 'ASK'
import sys
import urllib.error
import urllib.request

try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=10)
except urllib.error.HTTPError:
    pass
ASK
    else
        return 1
    fi
}

# The package index of pip: from its settings, else the default.
package_index() {
    local index="${PIP_INDEX_URL:-}"
    [[ -n "$index" || -z "$python" ]] || index="$("$python" -m pip config get global.index-url 2> /dev/null || true)"
    printf '%s\n' "${index:-https://pypi.org/simple/}"
}

check_packages() {
    local index torch
    [[ -x "$VENV_PYTHON" && -f "$ROOT/.venv/nanochat-setup.stamp" ]] && return
    if [[ -n "${PIP_NO_INDEX:-}" ]]; then
        report ok packages "from ${PIP_FIND_LINKS:-a folder} (PIP_NO_INDEX)"
    else
        index="$(package_index)"
        # An address may contain a password.
        if reachable "$index"; then
            report ok packages "${index##*@} answers"
        else
            report fail packages "the package index ${index##*@} does not answer, so nothing can be installed" \
                "check the network; a mirror: PIP_INDEX_URL; without a network a folder of wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=/folder"
        fi
    fi
    torch="$(bash "$ROOT/setup_env.sh" --print-torch)"
    report ok environment "not set up yet; setup_env.sh will install ${torch%%$'\n'*}"
    check_rust
}

check_rust() {
    if command -v cargo > /dev/null || [[ -x "$HOME/.cargo/bin/cargo" ]]; then
        if command -v cc > /dev/null || command -v gcc > /dev/null || command -v clang > /dev/null; then
            report ok rust "cargo and a linker are here"
        else
            report fail rust "cargo is here, but no linker (cc)" "Debian, Ubuntu: apt install gcc"
        fi
    elif [[ "$(id -u)" == 0 ]] && command -v apt-get > /dev/null || reachable https://sh.rustup.rs; then
        report warn rust "no cargo found" "nothing to do: setup_env.sh installs it (package manager or rustup)"
    else
        report fail rust "no cargo here, and https://sh.rustup.rs does not answer" "install cargo (apt install cargo, or https://rustup.rs)"
    fi
}

# --- cards ------------------------------------------------------------------------------------------------------------

ask_smi() {
    nvidia-smi "--query-gpu=$1" --format=csv,noheader,nounits 2> /dev/null | grep -E '^[^,]+, [0-9.]+, '
}

# One line per card: name, memory in MiB, driver, capability ("" where nvidia-smi is too old to know it).
list_cards() {
    command -v nvidia-smi > /dev/null || return 0
    ask_smi name,memory.total,driver_version,compute_cap | grep -E ', [0-9]+\.[0-9]+$' ||
        ask_smi name,memory.total,driver_version || true
}

# By name, for an nvidia-smi that does not report it; "" if unknown.
guess_capability() {
    case "$1" in
        *P100*) echo 6.0 ;;
        *P40* | *P4 | *P6 | *"GTX 10"* | *"TITAN X"*) echo 6.1 ;;
        *V100* | *"TITAN V"*) echo 7.0 ;;
        *T4 | *"RTX 20"* | *"GTX 16"* | *"TITAN RTX"*) echo 7.5 ;;
        *K20* | *K40* | *K80* | *"GTX 6"* | *"GTX 7"*) echo 3.5 ;;
        *M40* | *M60* | *"GTX 9"*) echo 5.2 ;;
    esac
}

# 7.5 as 75, 10.0 as 100: whole numbers compare in bash.
check_driver() {
    local name="$1" driver="$2" capability="$3" branch="${2%%.*}"
    if [[ ! "$branch" =~ ^[0-9]+$ ]]; then
        report warn driver "nvidia-smi reports no driver version ($driver)" "any from 525.60 to 580 runs every card from Pascal on"
    elif [[ "$branch" -lt 525 ]]; then
        report fail driver "$driver is older than 525.60, which CUDA 12.6 needs" \
            "install driver 580 (the last one for P100 and V100; Debian, Ubuntu: apt install nvidia-driver-580) and reboot"
    elif [[ "$branch" -ge 590 && -n "$capability" && "${capability/./}" -lt 75 ]]; then
        report fail driver "$driver does not drive a $name: 580 is the last branch that does" \
            "install driver 580 (Debian, Ubuntu: apt install nvidia-driver-580, then apt-mark hold it) and reboot"
    else
        report ok driver "$driver"
    fi
}

check_memory_of_card() {
    local name="$1" memory_mib="$2"
    if [[ "$memory_mib" -lt 3500 ]]; then
        report fail vram "$name has $memory_mib MiB, less than training with the p100 profile needs at any depth" \
            "use the CPU: CUDA_VISIBLE_DEVICES= bash speedrun_p100.sh"
    elif [[ "$memory_mib" -lt 15000 ]]; then
        report warn vram "$name has $memory_mib MiB, less than 16 GB: the run takes a depth that fits, if it knows the card" \
            "nothing to do for a card in nanochat/cards.py; for another: DEPTH=$((memory_mib < 7000 ? 4 : memory_mib < 11000 ? 8 : 10)) VOCAB_SIZE=32768 bash speedrun_p100.sh"
    fi
}

check_card() {
    local name="$1" memory_mib="$2" driver="$3" capability="$4"
    report ok card "$name, capability ${capability:-unknown}, $memory_mib MiB, driver $driver"
    if [[ -n "$capability" && "${capability%%.*}" -lt 6 ]]; then
        report fail capability "$name has $capability: no torch that this project supports has kernels for cards before 6.0 (Pascal)" \
            "hide it: CUDA_VISIBLE_DEVICES= runs the demo on the CPU; with better cards beside it, name those (and set CUDA_DEVICE_ORDER=PCI_BUS_ID)"
        return
    fi
    check_driver "$name" "$driver" "$capability"
    check_memory_of_card "$name" "$memory_mib"
}

# True if a card is among those in CUDA_VISIBLE_DEVICES, counted as nvidia-smi does.
visible() {
    [[ -z "${CUDA_VISIBLE_DEVICES+set}" || "$CUDA_VISIBLE_DEVICES" == *-* || ",$CUDA_VISIBLE_DEVICES," == *",$1,"* ]]
}

# Which cards train if they differ: nanochat.cards decides, here as in the run.
check_choice() {
    local choice
    choice="$(printf '%s' "$gpus" | PYTHONPATH="$ROOT" "${python:-python3}" -m nanochat.cards 2> /dev/null | sed -n 2p)"
    if [[ "$choice" == *"; idle:"* ]]; then
        report warn cards "cards of different kinds: the run takes $choice" \
            "nothing to do; other cards: CUDA_VISIBLE_DEVICES (with CUDA_DEVICE_ORDER=PCI_BUS_ID)"
    else
        report ok cards "the run takes ${choice:-the fastest equal ones}, one process each (NPROC)"
    fi
}

check_cards() {
    local name memory driver capability place=0 count=0
    if [[ "${CUDA_VISIBLE_DEVICES-set}" == "" || "${CUDA_VISIBLE_DEVICES-}" == -1 ]]; then
        report ok cards "hidden by CUDA_VISIBLE_DEVICES: the demo will run, on the CPU"
        return 1
    fi
    while IFS=, read -r name memory driver capability; do
        [[ -n "$name" ]] || continue
        memory="${memory// /}" capability="${capability// /}"
        [[ -n "$capability" ]] || capability="$(guess_capability "$name")"
        if visible "$place"; then
            check_card "$name" "${memory%%.*}" "${driver// /}" "$capability"
            gpus+="$name,${capability:-?},${memory%%.*}"$'\n'
            count=$((count + 1))
        fi
        place=$((place + 1))
    done <<< "$(list_cards)"
    [[ "$count" -le 1 ]] || check_choice
    [[ "$count" == 0 ]] || return 0
    no_card
    return 1
}

no_card() {
    local said on_bus
    on_bus="$(lspci 2> /dev/null | grep -iE '(vga|3d|display).*nvidia' || true)"
    on_bus="${on_bus%%$'\n'*}" on_bus="${on_bus#*: }"
    if command -v nvidia-smi > /dev/null; then
        said="$(nvidia-smi 2>&1 || true)" said="${said%%$'\n'*}"
        if [[ -n "$on_bus" ]]; then
            report fail driver "$on_bus is built in, but nvidia-smi sees no card: $said" \
                "install a driver that knows it (P100, V100: 525.60 to 580; apt install nvidia-driver-580) and reboot; or run the demo on the CPU: CUDA_VISIBLE_DEVICES= bash speedrun_p100.sh"
            return
        fi
        report warn cards "nvidia-smi is installed but shows no card: $said" \
            "if this machine has one, install driver 580 and reboot; without one nothing is to do"
    elif [[ -n "$on_bus" ]]; then
        report warn driver "$on_bus is in this machine, but its driver is not installed" \
            "install driver 580 (in a container: docker run --gpus all); else the CPU is used"
    fi
    report ok cards "no CUDA card: the demo will run, on the CPU, and needs none"
}

# --- memory, disk, data -----------------------------------------------------------------------------------------------

memory_mib() {
    local pages page limit mib=0
    pages="$(getconf _PHYS_PAGES 2> /dev/null || echo 0)" page="$(getconf PAGESIZE 2> /dev/null || echo 4096)"
    if [[ "$pages" =~ ^[0-9]+$ && "$pages" -gt 0 ]]; then
        mib=$((pages * page / 1048576))
    else
        mib=$(($(sysctl -n hw.memsize 2> /dev/null || echo 0) / 1048576))
    fi
    # A container may have less than its machine.
    limit="$(cat "$CGROUP_LIMIT" 2> /dev/null || echo max)"
    if [[ "$limit" =~ ^[0-9]+$ && "${#limit}" -lt 18 && $((limit / 1048576)) -lt "$mib" ]]; then
        mib=$((limit / 1048576))
    fi
    echo "$mib"
}

# check_memory WANTED LEAST, in GiB. A "16 GB" machine shows a bit less.
check_memory() {
    local wanted="$1" least="$2" mib
    mib="$(memory_mib)"
    if [[ "$mib" == 0 ]]; then
        report warn memory "can't be determined here" "make sure that there are $wanted GB"
    elif [[ "$mib" -lt $((least * 1024 - 512)) ]]; then
        report fail memory "$((mib / 1024)) GiB; this run needs $wanted GB" \
            "a machine with more memory, a higher limit of the container, or the demo: CUDA_VISIBLE_DEVICES= PROFILE=demo bash speedrun_p100.sh"
    elif [[ "$mib" -lt $((wanted * 1024 - 1024)) ]]; then
        report warn memory "$((mib / 1024)) GiB; $wanted GB are recommended" "close other programs; a smaller VOCAB_SIZE and NPROC=1 need less"
    else
        report ok memory "$((mib / 1024)) GiB"
    fi
}

# "free GiB, device" of a folder that may not exist yet.
disk_of() {
    local folder="$1"
    while [[ ! -d "$folder" ]]; do folder="$(dirname "$folder")"; done
    df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1024 / 1024), $1 }'
}

used_gib() {
    [[ -d "$1" ]] && du -sk "$1" 2> /dev/null | awk '{ print int($1 / 1024 / 1024) }' || echo 0
}

say_disk() {
    local free="$1" needed="$2" folder="$3" what="$4"
    if [[ "$free" -lt "$needed" ]]; then
        report fail disk "$free GiB free in $folder; $what: $needed GiB" \
            "free some space, or put data and models on another disk: NANOCHAT_BASE_DIR=/big/disk/nanochat"
    else
        report ok disk "$free GiB free in $folder; $what: $needed GiB"
    fi
}

# check_disk DATA ENVIRONMENT, in GiB; files that exist already count.
check_disk() {
    local data="$1" environment="$2" free_data free_root disk_data disk_root
    data=$((data - $(used_gib "$BASE_DIR"))) data=$((data > 1 ? data : 1))
    environment=$((environment - $(used_gib "$ROOT/.venv"))) environment=$((environment > 1 ? environment : 1))
    [[ -f "$ROOT/.venv/nanochat-setup.stamp" ]] && environment=0
    read -r free_data disk_data <<< "$(disk_of "$BASE_DIR")"
    read -r free_root disk_root <<< "$(disk_of "$ROOT")"
    if [[ "$environment" == 0 ]]; then
        say_disk "$free_data" "$data" "$BASE_DIR" "data and models"
    elif [[ "$disk_data" == "$disk_root" ]]; then
        say_disk "$free_data" "$((data + environment))" "$BASE_DIR" "data, models and the environment"
    else
        say_disk "$free_data" "$data" "$BASE_DIR" "data and models"
        say_disk "$free_root" "$environment" "$ROOT" "the environment"
    fi
}

# Data from public sources: text without DATA_DIR, conversations without CHAT_DATA.
check_data() {
    local missing=""
    [[ -n "${DATA_DIR:-}" || "${DATASET:-}" == demo ]] || missing="text"
    [[ -n "${CHAT_DATA:-}" && "$CHAT_DATA" != nanochat || "${DATASET:-}" == demo ]] || missing="$missing${missing:+ and }conversations"
    if [[ -n "${DATA_DIR:-}" ]]; then
        if [[ -e "$DATA_DIR" ]]; then
            report ok data "$DATA_DIR"
        else
            report fail data "DATA_DIR=$DATA_DIR does not exist" "correct it"
        fi
    fi
    if [[ -z "$missing" ]]; then
        return
    elif reachable "$HUB"; then
        report ok network "$HUB answers"
    else
        report fail network "$HUB does not answer, so no public $missing can be downloaded" \
            "check the network, set HF_ENDPOINT to a mirror, or set DATA_DIR and CHAT_DATA to your own files"
    fi
}

# --- after the set-up -------------------------------------------------------------------------------------------------

# nanochat.pipeline.verify prints lines "status, name, text, remedy", separated by tabs.
check_deep() {
    local status name text remedy lines limit=()
    [[ -x "$VENV_PYTHON" ]] || return 0
    ! command -v timeout > /dev/null || limit=(timeout 300)
    if ! lines="$(cd "$ROOT" && "${limit[@]+"${limit[@]}"}" "$VENV_PYTHON" -m nanochat.pipeline.verify --tsv 2>&1)"; then
        lines="$(tail -n 1 <<< "$lines" | tr '\t' ' ')"
        report fail environment "the environment in .venv does not work: $lines" "bash setup_env.sh (rm -rf .venv first if that does not help)"
        return
    fi
    while IFS=$'\t' read -r status name text remedy; do
        case "$status" in ok | warn | fail) report "$status" "$name" "$text" "$remedy" ;; esac
    done <<< "$lines"
}

main() {
    local on_cards=no
    case "${1:-}" in
        "") ;;
        --json) JSON=yes ;;
        -h | --help)
            sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"
            return
            ;;
        *)
            echo "unknown option $1 (there is --json)" >&2
            return 2
            ;;
    esac
    check_python
    ! check_cards || on_cards=yes
    plan="${PROFILE:-auto}"
    if [[ "$plan" == auto ]]; then
        plan=demo
        [[ -z "${DATA_DIR:-}" && "${DATASET:-demo}" == demo ]] || plan=cpu
        [[ "$on_cards" == no ]] || plan=p100
    fi
    case "$plan" in
        p100 | d20)
            [[ "$on_cards" == yes ]] ||
                report fail plan "PROFILE=$plan needs a CUDA card" "PROFILE=demo bash speedrun_p100.sh runs on the CPU"
            check_memory 16 11
            check_disk "$([[ "$plan" == d20 ]] && echo 60 || echo 17)" 12
            check_data
            ;;
        *)
            check_memory 4 3
            check_disk 2 3
            if [[ "$plan" == cpu ]]; then CHAT_DATA="${CHAT_DATA:-demo}" check_data; fi
            ;;
    esac
    check_packages
    check_deep
    if [[ "$JSON" == yes ]]; then
        print_json
    elif [[ "$problems" == 0 ]]; then
        echo "ready: bash speedrun_p100.sh (profile $plan)"
    else
        echo "$problems problem(s): solve the ✗ lines, then run this again"
    fi
    [[ "$problems" == 0 ]]
}

main "$@"
