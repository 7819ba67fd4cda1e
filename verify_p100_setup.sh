#!/usr/bin/env bash
# Check whether a run will work on this machine; changes nothing. Needs bash; after `bash setup_env.sh` it tests torch too.
#   bash verify_p100_setup.sh           ✓ good, ⚠ works, but …, ✗ will not work; → what to do
#   bash verify_p100_setup.sh --json    the same for programs
# Exit 0: a run will work; 1: it won't, and the ✗ lines say why; 2: an unknown option.
# The settings of the run count (bash speedrun_p100.sh -h), and HF_ENDPOINT and CUDA_VISIBLE_DEVICES.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV_PYTHON="$ROOT/.venv/bin/python"
BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
PYTORCH=https://download.pytorch.org/whl
HUB="${HF_ENDPOINT:-https://huggingface.co}"
CGROUP_LIMIT=/sys/fs/cgroup/memory.max
OS_RELEASE=/etc/os-release
JSON=no

STATUSES=() NAMES=() TEXTS=() REMEDIES=()
problems=0 plan="" python="" environment_gb=6

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
    local name found="" able='import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 15))'
    for name in python3.13 python3.12 python3.11 python3.10 python3.14 python3; do
        command -v "$name" > /dev/null || continue
        "$name" -c '' 2> /dev/null || continue # a shim without a Python behind it
        found="$found${found:+, }$("$name" --version 2>&1)"
        if "$name" -c "$able" 2> /dev/null; then
            python="$name"
            break
        fi
    done
    if [[ -z "$python" ]]; then
        report fail python "no Python 3.10 to 3.14 with its venv module (here: ${found:-none})" \
            "install one (Debian, Ubuntu: apt install python3 python3-venv; else https://docs.astral.sh/uv: uv python install 3.12)"
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
    local index torch download disk
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
    IFS=$'\t' read -r torch download disk <<< "$(bash "$ROOT/setup_env.sh" --print-sizes)"
    if [[ "$torch" == *"$PYTORCH"* && -z "${PIP_NO_INDEX:-}" ]] && ! reachable "$PYTORCH"; then
        # A build from PyPI comes instead.
        IFS=$'\t' read -r torch download disk <<< "$(bash "$ROOT/setup_env.sh" --print-sizes | sed 1d)"
        report warn packages "$PYTORCH does not answer, so PyPI's build comes, with CUDA: $download GB to download, $disk GB on disk" \
            "nothing to do if the disk holds it; else allow that address, or set NANOCHAT_TORCH"
    fi
    disk="${disk:-5.0}" environment_gb=$((${disk%.*} + 1))
    report ok environment "not set up yet; setup_env.sh will download ${download:-?} GB ($disk GB on disk): $torch"
    check_rust
}

check_rust() {
    local without="set-up goes on without: PyPI's rustbpe trains the tokenizer, tiktoken encodes, more slowly"
    if ! { command -v cc || command -v gcc || command -v clang; } > /dev/null; then
        report warn rust "no linker (cc); $without" "for the fast tokenizer: apt install gcc (Debian, Ubuntu)"
    elif command -v cargo > /dev/null || [[ -x "$HOME/.cargo/bin/cargo" ]]; then
        report ok rust "cargo and a linker are here"
    elif reachable https://static.rust-lang.org; then
        report warn rust "no cargo found" "nothing to do: setup_env.sh installs it into your home folder, by rustup"
    else
        report warn rust "no cargo here, and https://static.rust-lang.org does not answer; $without" \
            "for the fast tokenizer: install cargo, or let set-up do it by the package manager: NANOCHAT_INSTALL_SYSTEM=1"
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

# How to install driver 580: every distribution names its package differently.
install_driver() {
    case "$(sed -n 's/^ID=//p' "$OS_RELEASE" 2> /dev/null)" in
        debian) echo "install NVIDIA's driver (Debian: apt install nvidia-driver, from non-free)" ;;
        ubuntu | linuxmint | pop) echo "install driver 580 (Ubuntu: apt install nvidia-driver-580)" ;;
        *) echo "install driver 580 (your distribution's package, or https://www.nvidia.com/drivers)" ;;
    esac
}

# True if a card is among those in CUDA_VISIBLE_DEVICES, counted as nvidia-smi does.
visible() {
    [[ -z "${CUDA_VISIBLE_DEVICES+set}" || "$CUDA_VISIBLE_DEVICES" == *-* || ",$CUDA_VISIBLE_DEVICES," == *",$1,"* ]]
}

# Report every visible card; fails without one that torch can use. nanochat/cards.py has the facts.
check_cards() {
    local name memory driver capability place=0 gpus="" usable=1 lines status text remedy
    if [[ "${CUDA_VISIBLE_DEVICES-set}" == "" || "${CUDA_VISIBLE_DEVICES-}" == -1 ]]; then
        report ok cards "hidden by CUDA_VISIBLE_DEVICES: the demo will run, on the CPU"
        return 1
    fi
    while IFS=, read -r name memory driver capability; do
        [[ -n "$name" ]] || continue
        memory="${memory// /}" capability="${capability// /}"
        ! visible "$place" || gpus+="$name,${capability:-?},${memory%%.*},${driver// /}"$'\n'
        place=$((place + 1))
    done <<< "$(list_cards)"
    if [[ -z "$gpus" ]]; then
        no_card
        return 1
    fi
    lines="$(printf '%s' "$gpus" | PYTHONPATH="$ROOT" "${python:-python3}" -m nanochat.pipeline.card_checks verify "$(install_driver)")" ||
        lines="warn"$'\t'"cards"$'\t'"can't be judged without Python: ${gpus%%$'\n'*}"$'\t'"install Python first"
    while IFS=$'\t' read -r status name text remedy; do
        report "$status" "$name" "$text" "$remedy"
        [[ "$name" != card ]] || usable=0
    done <<< "$lines"
    return "$usable"
}

no_card() {
    local said on_bus lines status name text remedy
    on_bus="$(lspci 2> /dev/null | grep -iE '(vga|3d|display).*nvidia' || true)"
    on_bus="${on_bus%%$'\n'*}" on_bus="${on_bus#*: }"
    if command -v nvidia-smi > /dev/null; then
        said="$(nvidia-smi 2>&1 || true)" said="${said%%$'\n'*}"
        if [[ -n "$on_bus" ]]; then
            report fail driver "$on_bus is built in, but nvidia-smi sees no card: $said" \
                "$(install_driver) and reboot (P100, V100: any from 525.60 to 580); or run the demo on the CPU: CUDA_VISIBLE_DEVICES= bash speedrun_p100.sh"
            return
        fi
        report warn cards "nvidia-smi is installed but shows no card: $said" \
            "if this machine has one, $(install_driver) and reboot; without one nothing is to do"
    elif [[ -n "$on_bus" ]]; then
        report warn driver "$on_bus is in this machine, but its driver is not installed" \
            "$(install_driver); in a container: docker run --gpus all; else the CPU is used"
    fi
    lines="$(PYTHONPATH="$ROOT" "${python:-python3}" -m nanochat.pipeline.card_checks other 2> /dev/null)" || lines=""
    while IFS=$'\t' read -r status name text remedy; do
        [[ -z "$text" ]] || report "$status" "$name" "$text" "$remedy"
    done <<< "$lines"
    [[ -n "$lines" ]] || report ok cards "no CUDA card: the demo will run, on the CPU, and needs none"
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

# "free GB, device" of a folder that may not exist yet.
disk_of() {
    local folder="$1"
    while [[ ! -d "$folder" ]]; do folder="$(dirname "$folder")"; done
    df -Pk "$folder" | awk 'NR == 2 { print int($4 * 1.024e-6), $1 }'
}

used_gb() {
    [[ -d "$1" ]] && du -sk "$1" 2> /dev/null | awk '{ print int($1 * 1.024e-6) }' || echo 0
}

# check_disk DATA, in GB; files that exist already count. No second line if nanochat.pipeline.verify has printed one.
check_disk() {
    local data="$1" environment=0 free_data free_root disk_data disk_root text status=ok remedy=""
    [[ " ${NAMES[*]} " != *" disk "* ]] || return 0
    data=$((data - $(used_gb "$BASE_DIR"))) data=$((data > 1 ? data : 1))
    if [[ ! -f "$ROOT/.venv/nanochat-setup.stamp" ]]; then
        environment=$((environment_gb - $(used_gb "$ROOT/.venv"))) environment=$((environment > 1 ? environment : 1))
    fi
    read -r free_data disk_data <<< "$(disk_of "$BASE_DIR")"
    read -r free_root disk_root <<< "$(disk_of "$ROOT")"
    if [[ "$environment" == 0 || "$disk_data" == "$disk_root" ]]; then
        text="$free_data GB free in $BASE_DIR; data and models: $data GB, the environment: $environment GB"
        [[ "$free_data" -ge $((data + environment)) ]] || status=fail
    else
        text="$free_data GB free in $BASE_DIR (data and models: $data GB), $free_root GB in $ROOT (the environment: $environment GB)"
        [[ "$free_data" -ge "$data" && "$free_root" -ge "$environment" ]] || status=fail
    fi
    [[ "$status" == ok ]] || remedy="free some space, or put data and models on another disk: NANOCHAT_BASE_DIR=/big/disk/nanochat"
    report "$status" disk "$text" "$remedy"
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
    local on_cards=no data_gb
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
            data_gb="$([[ "$plan" == d20 ]] && echo 65 || echo 34)"
            check_data
            ;;
        *)
            check_memory 4 3
            data_gb=2
            if [[ "$plan" == cpu ]]; then CHAT_DATA="${CHAT_DATA:-demo}" check_data; fi
            ;;
    esac
    check_packages
    check_deep
    check_disk "$data_gb"
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
