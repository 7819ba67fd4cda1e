"""Supervised fine-tuning: the mid-trained model learns to answer; only the assistant's tokens are supervised.

python -m scripts.chat_sft
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from nanochat.config import run_script, short
from nanochat.train.finetune import SFT, FinetuneConfig, finetune
from tasks.mixtures import conversations


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig):
    """Settings of SFT: gentler than mid-training, and on the assistant's tokens only."""

    source: Annotated[Literal["base", "mid"] | None, short("-i")] = None
    """The stage whose model learns to answer; default: mid."""
    total_batch_size: int = 32768
    """Tokens per optimizer step, padding included."""
    init_lr_frac: float = 0.02
    """All learning rates start at this share of the base run's."""
    warmdown_ratio: float = 1.0
    """Share of the run in which the learning rate falls."""
    supervise: Literal["all", "assistant"] = "assistant"
    """Learn every token of a conversation, or the assistant's only."""
    isolate_conversations: bool = True
    """Read each conversation of a sequence as if it were alone in it."""


def main(cfg: Config) -> None:
    """Train on the SFT mixture."""
    finetune(
        replace(SFT, source=cfg.source or SFT.source), cfg, lambda budget: conversations("sft", cfg.chat_data, budget)
    )


if __name__ == "__main__":
    run_script(main, Config)
