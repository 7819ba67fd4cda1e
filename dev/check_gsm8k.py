"""Check that GSM8K's own answers all score 1, and that none scores when its number is changed.

NANOCHAT_TASK_DIR=... python -m dev.check_gsm8k
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from nanochat.config import run_script
from tasks.gsm8k import GSM8K


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the check."""

    splits: tuple[str, ...] = ("test", "train")
    """Splits of the data set."""


def main(cfg: Config) -> None:
    """Count; exit 1 if anything is wrong."""
    failed = False
    for split in cfg.splits:
        task = GSM8K(split)
        right = wrong = 0
        for problem in task:
            answer = "".join(part["text"] for part in problem["messages"][-1]["content"])
            right += task.evaluate(problem, answer)
            wrong += task.evaluate(problem, f"{answer}1")
        print(f"GSM8K {split}: reference answers right {right}/{len(task)}; with one more digit {wrong}")
        failed = failed or right != len(task) or wrong > 0
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, Config)
