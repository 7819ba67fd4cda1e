"""Check that HumanEval's own solutions all pass, and that none passes when its body is `pass`.

NANOCHAT_TASK_DIR=... python -m dev.check_humaneval
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nanochat.config import run_script
from nanochat.execution import isolation
from tasks.humaneval import HumanEval


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the check."""

    workers: int = 2
    """Programs that run at the same time."""


def judge(task: HumanEval, bodies: list[str], workers: int) -> list[bool]:
    """Judge one completion per problem."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda i: task.evaluate(task[i], bodies[i]), range(len(task))))


def main(cfg: Config) -> None:
    """Count and name what is wrong; exit 1 if anything is."""
    print(f"isolation is {isolation()}")
    task = HumanEval(allow_weak_isolation=True)
    start = time.monotonic()
    right = judge(task, [task[i]["messages"][1]["content"] for i in range(len(task))], cfg.workers)
    seconds = time.monotonic() - start
    wrong = judge(task, ["    pass"] * len(task), cfg.workers)
    print(f"canonical solutions: {sum(right)}/{len(right)} pass, in {seconds:.1f} s; `pass`: {sum(wrong)} pass")
    for i, (good, bad) in enumerate(zip(right, wrong, strict=True)):
        if not good or bad:
            print(f"  {task[i]['entry_point']}: canonical {good}, `pass` {bad}")
    if not all(right) or any(wrong):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, Config)
