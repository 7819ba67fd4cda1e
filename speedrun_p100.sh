#!/usr/bin/env bash
# From scratch to a model that answers: set-up, tokenizer, base, mid, SFT, report, one question.
# Help: bash speedrun_p100.sh -h
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    cat << 'HELP'
bash speedrun_p100.sh [--dry_run]      (bash speedrun.sh: the same for 8 large cards)

Trains an assistant from scratch and asks it one question. Run it again to resume where it stopped: finished stages are
skipped, and stages whose settings have changed run again. Ctrl-C and `kill` save first; the exit code is then 75 (an
error: 1). Settings come from the environment:

  PROFILE            auto (default): p100 with a CUDA card; without one, cpu for your own data, else demo
                     demo (a small world, minutes on a CPU), cpu, p100, d20 (8 cards), tiny (a test)
  DEPTH              layers of the model; the width follows (default with a card that holds it: 12). "auto" takes the
                     depth that should learn most on this card in HOURS
  VOCAB_SIZE         size of the vocabulary (at least 265; default with a card: 65536). "auto" takes the one that should
                     learn most on this card in HOURS
  HOURS              time for base training (with a card 8); mid-training takes another third of it (at most half an
                     hour), SFT a sixth (at most 20 minutes). The demo on a CPU: time for everything (default: 5
                     minutes, or what its fewest steps take)
  RECIPE             small (default), portable (opens in llama.cpp, Ollama and others), classic or modern
  DATASET            climbmix, fineweb_edu (both downloaded) or demo. On a CPU, without DEPTH and RECIPE, the model
                     carries a part of such a text with it (base_train --recall)
  DATA_DIR           your own text instead: a folder (or file) of nearly any form (docs/own_data.md)
  TEXT_COLUMN        the column or field with the text, ENCODING what its files are saved in (default: found by itself)
  SOURCE_CODE        1 learns the source code in DATA_DIR too, 0 leaves it out on purpose
  BASE               go on from this model, with its tokenizer, instead of from nothing: the tag of a base model, its
                     folder, or a folder in the format of transformers; with DATA_DIR, CHAT_DATA or both
  CHAT_DATA          your own conversations in any usual form: a file, a folder or hf:owner/name; "demo", "nanochat" for its
                     mixture from the hub, or "none" (chat with the base model)
  WORLD              what the demo learns: a folder of your own tables (tasks/demo/world/README.md), "nanochat" (the world that
                     comes with it; more of it with more HOURS), or both with a comma between
  CHAT_ME            of chats between people (WhatsApp, Telegram ...): whose messages the model learns to write
  CHAT_COLUMNS       question,answer: the two fields of CHAT_DATA, where their names don't say it
  NPROC              processes, one per card (default: all cards of one kind; of several kinds the fastest group)
  WANDB_RUN          name of a Weights & Biases run (default: none)
  NANOCHAT_BASE_DIR  folder for everything (default ~/.cache/nanochat)

  DATA_DIR=~/texts CHAT_DATA=~/chats.jsonl HOURS=2 bash speedrun_p100.sh
HELP
}

# Paths are relative to the user's folder, but the stages run in the project's.
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
# WORLD is a list with commas between.
make_worlds_absolute() {
    local part parts all=""
    [[ -n "${WORLD:-}" ]] || return 0
    IFS=, read -ra parts <<< "$WORLD"
    for part in "${parts[@]}"; do
        case "$part" in nanochat | nanochat:* | /* | "~"*) ;; *) part="$PWD/$part" ;; esac
        all="$all${all:+,}$part"
    done
    export WORLD="$all"
}

make_absolute DATA_DIR
make_absolute NANOCHAT_BASE_DIR
make_worlds_absolute
if [[ -e "${BASE:-}" ]]; then # else a tag, or a name on the hub
    make_absolute BASE
fi
case "${CHAT_DATA:-}" in
    demo | nanochat | none | hf:*) ;;
    *) make_absolute CHAT_DATA ;;
esac
bash "$ROOT/setup_env.sh"
cd "$ROOT"
exec .venv/bin/python -m nanochat.pipeline "$@"
