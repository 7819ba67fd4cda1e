from nanochat.config import run_script
from nanochat.pipeline import Config, main

run_script(main, Config)
