import sys

from nanochat.env import missing_packages

if missing_packages():  # before an import that fails without them
    sys.exit(missing_packages())

from nanochat.config import run_script
from nanochat.pipeline.run import Config, main

if __name__ == "__main__":
    run_script(main, Config)
