"""Mid-training: the base model learns conversations, tools and multiple choice.

python -m scripts.mid_train --total_batch_size=131072
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.config import run_script
from nanochat.train.finetune import MID, FinetuneConfig, finetune
from tasks.mixtures import conversations


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig):
    """Settings of mid-training."""


def main(cfg: Config) -> None:
    """Train on the mid-training mixture."""
    finetune(MID, cfg, lambda budget: conversations("mid", cfg.chat_data, budget))


if __name__ == "__main__":
    run_script(main, Config)
