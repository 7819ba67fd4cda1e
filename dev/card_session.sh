#!/usr/bin/env bash
# Everything worth knowing about one CUDA card in eight minutes: one JSON and one table (dev/card_session.py says what).
# Needs Python with torch 2.11 or newer, transformers, safetensors, numpy and pyarrow; installs nothing.
#
#   bash dev/card_session.sh [--out card.json] [--peer /folder/of/nanochat] [--parts dtypes,steps]
#   bash dev/card_session.sh --device_type=cpu --tiny      every part at a tiny size, to find a typo before a card's time
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"
[[ -x "$PYTHON" ]] || PYTHON="$(command -v python3)"
PYTHONPATH="$ROOT" exec "$PYTHON" "$ROOT/dev/card_session.py" "$@"
