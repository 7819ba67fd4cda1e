"""The stages of the pipeline; each runs as `python -m scripts.<name>`."""

import sys

from nanochat.env import missing_packages

if missing_packages():
    sys.exit(missing_packages())
