"""HumanEval's own solutions must all pass, and none may when its body is `pass`.

NANOCHAT_TASK_DIR=... python -m dev.check_humaneval
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from nanochat.execution import isolation
from tasks.humaneval import HumanEval


def count_passes(task: HumanEval, bodies: list[str]) -> list[bool]:
    """Judge one completion per problem."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda i: task.evaluate(task[i], bodies[i]), range(len(task))))


def main() -> int:
    """Count and name what is wrong; exit 1 if anything is."""
    print(f"isolation is {isolation()}")
    task = HumanEval(allow_weak_isolation=True)
    start = time.monotonic()
    right = count_passes(task, [task[i]["messages"][1]["content"] for i in range(len(task))])
    seconds = time.monotonic() - start
    wrong = count_passes(task, ["    pass"] * len(task))
    print(f"canonical solutions: {sum(right)}/{len(right)} pass, in {seconds:.1f} s; `pass`: {sum(wrong)} pass")
    for i, (good, bad) in enumerate(zip(right, wrong, strict=True)):
        if not good or bad:
            print(f"  {task[i]['entry_point']}: canonical {good}, `pass` {bad}")
    return int(not all(right) or any(wrong))


if __name__ == "__main__":
    sys.exit(main())
