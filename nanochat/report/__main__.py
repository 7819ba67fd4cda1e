from nanochat.config import run_script
from nanochat.report import Config, main

run_script(main, Config)
