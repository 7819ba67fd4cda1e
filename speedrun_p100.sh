#!/usr/bin/env bash
# From nothing to a model that answers: set-up, tokenizer, base, mid, SFT, report, one question.
# Help: bash speedrun_p100.sh -h
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    cat << 'HELP'
bash speedrun_p100.sh [--dry_run]      (bash speedrun.sh: the same for 8 large cards)

Trains an assistant from nothing and asks it one question. Run it again to go on where it stopped: finished stages are
skipped, and what has changed is made again. Ctrl-C or `kill` save first; the exit code is then 75 (1: an error).
Settings come from the environment:

  PROFILE            auto (default): p100 with a CUDA card; without one cpu for your own data, else demo
                     demo (a small world, minutes on a CPU), cpu, p100, d20 (8 cards), tiny (a test)
  DEPTH              layers of the model; the width follows (default with a card: what learns most on it in HOURS)
  VOCAB_SIZE         tokens of the vocabulary (at least 265)
  HOURS              time of base training; mid-training gets a third and SFT a sixth of it on top
  DATASET            climbmix, fineweb_edu (both downloaded) or demo
  DATA_DIR           your own text instead: a folder (or file) of txt, md, html, jsonl, csv or parquet
  CHAT_DATA          your own conversations (.jsonl or .parquet), "demo", or "nanochat" for its mixture from the hub
  NPROC              processes, one per card (default: all equal cards; of unequal ones the faster group)
  WANDB_RUN          name of a Weights & Biases run (default: none)
  NANOCHAT_BASE_DIR  where everything goes (default ~/.cache/nanochat)

  DATA_DIR=~/texts CHAT_DATA=~/chats.jsonl HOURS=2 bash speedrun_p100.sh
HELP
}

# Paths are meant from where the user stands, but the stages run in the project's folder.
make_absolute() {
    local name="$1" value="${!1:-}"
    if [[ -n "$value" && "$value" != /* && "$value" != "~"* ]]; then
        export "$name=$PWD/$value"
    fi
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac
make_absolute DATA_DIR
make_absolute NANOCHAT_BASE_DIR
case "${CHAT_DATA:-}" in
    demo | nanochat) ;;
    *) make_absolute CHAT_DATA ;;
esac
bash "$ROOT/setup_env.sh"
cd "$ROOT"
exec .venv/bin/python -m nanochat.pipeline "$@"
