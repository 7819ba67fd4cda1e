"""Measure how fast a model answers; see dev/bench/infer_bench.py.

python -m scripts.infer_bench                                        the newest chat model
python -m scripts.infer_bench --depth 12 --vocab_size 32768          random weights of this shape
"""

from __future__ import annotations

from dev.bench.infer_bench import Config, main
from nanochat.config import run_script

if __name__ == "__main__":
    run_script(main, Config)
