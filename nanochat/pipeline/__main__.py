from nanochat.config import run_script
from nanochat.pipeline.run import Config, main

if __name__ == "__main__":
    run_script(main, Config)
