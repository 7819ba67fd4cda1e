"""GSM8K's own answers must all score 1, and none may when its number is another.

NANOCHAT_TASK_DIR=... python -m dev.check_gsm8k
"""

from __future__ import annotations

import sys

from tasks.gsm8k import GSM8K


def main() -> int:
    """Count; exit 1 if anything is wrong."""
    failed = False
    for split in ("test", "train"):
        task = GSM8K(split)
        right = wrong = 0
        for problem in task:
            answer = "".join(part["text"] for part in problem["messages"][-1]["content"])
            right += task.evaluate(problem, answer)
            wrong += task.evaluate(problem, f"{answer}1")
        print(f"GSM8K {split}: reference answers right {right}/{len(task)}; with one more digit {wrong}")
        failed = failed or right != len(task) or wrong > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
