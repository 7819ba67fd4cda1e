"""Reinforcement learning: the SFT model tries problems with the tools it has, and learns from its right answers.

python -m scripts.chat_rl --task=GSM8K --device_batch_size=8
python -m scripts.chat_rl --task=DemoWordSums --max_new_tokens=32     on a model of the demo world, on a CPU
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.config import run_script
from nanochat.train.rl import RLConfig, reinforce
from tasks.mixtures import RL_TASKS, rl_tasks


@dataclass(frozen=True, kw_only=True)
class Config(RLConfig):
    """Settings of reinforcement learning."""

    task: str | None = None
    """GSM8K, SpellingBee or DemoWordSums; default: the last for a model of the demo world, else GSM8K."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None and self.task not in RL_TASKS:
            raise ValueError(f"--task={self.task}: choose one of {', '.join(RL_TASKS)}")


def main(cfg: Config) -> None:
    """Train on a task."""
    reinforce(cfg, lambda meta: rl_tasks(cfg.task, meta))


if __name__ == "__main__":
    run_script(main, Config)
