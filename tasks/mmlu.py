"""MMLU: four-choice exam questions from 57 subjects, primary school to professional.

Source: Hendrycks et al. 2020, "Measuring Massive Multitask Language Understanding", https://arxiv.org/abs/2009.03300
Data set: cais/mmlu on the hub, or mmlu/{dev,validation,test,auxiliary_train}.jsonl under NANOCHAT_TASK_DIR.
"""

from __future__ import annotations

from typing import Literal

from tasks.common import Conversation, Task, letters_for, render_mc
from tasks.sources import Row, load_rows


class MMLU(Task):
    """Multiple choice exam questions; answers are letters. Train on subset "auxiliary_train", split "train"."""

    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25

    def __init__(
        self,
        subset: Literal["all", "auxiliary_train"],
        split: Literal["train", "dev", "validation", "test"],
        *,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        splits = {"all": ("dev", "validation", "test"), "auxiliary_train": ("train",)}
        if split not in splits.get(subset, ()):
            raise ValueError(f"MMLU has {splits}, not subset {subset!r}, split {split!r}")
        super().__init__(start=start, stop=stop, step=step)
        local_file = f"mmlu/{split if subset == 'all' else subset}.jsonl"
        self.rows = load_rows("cais/mmlu", subset, split, local_file, ())

    def get_example(self, index: int) -> Conversation:
        row: Row = self.rows[index]
        row = row.get("train", row)  # the hub wraps the rows of auxiliary_train in one column
        choices = list(row["choices"])
        letters = letters_for(choices)
        return {
            "messages": [
                {"role": "user", "content": render_mc(row["question"], letters, choices)},
                {"role": "assistant", "content": letters[int(row["answer"])]},
            ],
            "letters": letters,
            "subject": row.get("subject", ""),
        }

    def evaluate(self, problem: Conversation, completion: str) -> bool:
        return completion == problem["messages"][-1]["content"]
