"""The stages of the pipeline; each runs as `python -m scripts.<name>`."""

import importlib.util
import sys

if importlib.util.find_spec("tyro") is None:  # most likely the system's own Python
    sys.exit(
        f"{sys.executable} lacks the packages of nanochat: run `source .venv/bin/activate` first "
        "(`bash setup_env.sh` makes .venv)"
    )
