"""ARC: grade-school science questions with 3 to 5 choices, an easy and a challenge set.

Source: Clark et al. 2018, "Think you have Solved Question Answering?", https://arxiv.org/abs/1803.05457
Data set: allenai/ai2_arc on the hub, or arc/<subset>/<split>.jsonl under NANOCHAT_TASK_DIR.
"""

from __future__ import annotations

from typing import Literal

from tasks.common import Conversation, Task, letters_for, render_mc
from tasks.sources import load_rows


class ARC(Task):
    """Multiple choice science questions; answers are letters."""

    eval_type = "categorical"
    baseline = 0.25

    def __init__(
        self,
        subset: Literal["ARC-Easy", "ARC-Challenge"],
        split: Literal["train", "validation", "test"],
        *,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        if subset not in ("ARC-Easy", "ARC-Challenge"):
            raise ValueError(f"ARC has the subsets ARC-Easy and ARC-Challenge, not {subset!r}")
        self.name = subset
        super().__init__(start=start, stop=stop, step=step)
        self.rows = load_rows(
            "allenai/ai2_arc", subset, split, f"arc/{subset}/{split}.jsonl", ("question", "choices", "answerKey")
        )

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        choices, labels = list(row["choices"]["text"]), list(row["choices"]["label"])
        letters = letters_for(choices)  # a few questions label their choices 1, 2, 3, 4
        answer = letters[labels.index(row["answerKey"])]
        return {
            "messages": [
                {"role": "user", "content": render_mc(row["question"], letters, choices)},
                {"role": "assistant", "content": answer},
            ],
            "letters": letters,
        }

    def evaluate(self, problem: Conversation, completion: str) -> bool:
        return completion == problem["messages"][-1]["content"]
