#!/usr/bin/env bash
# nanochat's own speedrun: the pipeline of speedrun_p100.sh at depth 20, on large cards through torchrun.
# All settings of speedrun_p100.sh work here too (bash speedrun.sh -h); NPROC takes fewer than all cards.
set -euo pipefail

export PROFILE="${PROFILE:-d20}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/speedrun_p100.sh" "$@"
