"""Pretrain the base model: predict the next token of plain text.

python -m scripts.base_train --depth=12 --hours=8
python -m scripts.base_train --depth=12 --recipe=modern --hours=8
torchrun --standalone --nproc_per_node=8 --max_restarts=3 -m scripts.base_train --depth=20   (resumes when a rank dies)
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.config import run_script
from nanochat.train.pretrain import pretrain
from nanochat.train.pretrain_config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(PretrainConfig):
    """Settings of a pretraining run."""


def main(cfg: Config) -> None:
    """Plan, build, train, report."""
    pretrain(cfg)


if __name__ == "__main__":
    run_script(main, Config)
