#!/usr/bin/env bash
# Install the clients that tests/test_clients.py runs, apart from the project: their requirements exclude each other's and
# ours. Into .clients (or $NANOCHAT_CLIENTS); again, it does nothing. About 300 MB.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
CLIENTS="${NANOCHAT_CLIENTS:-$ROOT/.clients}"
LIST="$ROOT/tests/clients/requirements.txt"
PACKAGES="$ROOT/tests/clients/package.json"

stamp="$(cat "$LIST" "$PACKAGES" | cksum)"
[[ "$(cat "$CLIENTS/installed" 2> /dev/null)" != "$stamp" ]] || exit 0
mkdir -p "$CLIENTS"
"$ROOT/.venv/bin/python" -m venv "$CLIENTS/uv"
"$CLIENTS/uv/bin/pip" install -q uv
# uv: pip tries for ten minutes which versions go together.
"$CLIENTS/uv/bin/uv" venv -q --clear --python "$ROOT/.venv/bin/python" "$CLIENTS/venv"
"$CLIENTS/uv/bin/uv" pip install -q --python "$CLIENTS/venv/bin/python" -r "$LIST"
if command -v npm > /dev/null; then
    cp "$PACKAGES" "$CLIENTS/"
    (cd "$CLIENTS" && npm install --silent --no-audit --no-fund --ignore-scripts)
else
    echo "no npm: the clients in JavaScript are left out" >&2
fi
echo "$stamp" > "$CLIENTS/installed"
