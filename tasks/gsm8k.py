"""GSM8K: grade-school word problems whose answers end in "#### <number>".

Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168
Data set: openai/gsm8k on the hub, or gsm8k/<split>.jsonl under NANOCHAT_TASK_DIR.
The calculator annotations of the reference answers, <<48/2=24>>, become calls of the calculator tool.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from tasks.common import Conversation, Task
from tasks.sources import load_rows

_CALCULATOR_NOTE = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
# A sign and a currency sign in either order, then digits with or without thousands commas: -$1,234.50, $ -3, .5
_NUMBER = re.compile(r"(?P<sign>[-\u2212+]?)\s*[$€£]?\s*(?P<sign2>[-\u2212+]?)(?P<digits>\d[\d,]*(?:\.\d+)?|\.\d+)")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def extract_answer(text: str) -> Decimal | None:
    """The number after the last "####" of `text` that is followed by anything; None if there is none.

    >>> extract_answer("5 + 5 = 10 #### $10."), extract_answer("#### 1,000"), extract_answer("ten")
    (Decimal('10'), Decimal('1000'), None)
    """
    _, marker, answer = text.rstrip(" \t\r\n#").rpartition("####")
    match = _NUMBER.match(answer.lstrip(" \t\r\n*:=~")) if marker else None
    if match is None:
        return None
    digits = match["digits"].rstrip(",")  # the comma of "10, so ..." belongs to the sentence
    if "," in digits and not _THOUSANDS.fullmatch(digits):
        return None  # "1,2,3" is a list and "10,50" is ambiguous: neither is an answer
    negative = (match["sign"] in ("-", "\u2212")) != (match["sign2"] in ("-", "\u2212"))
    value = Decimal(digits.replace(",", ""))
    return -value if negative and value else value


def split_tool_calls(answer: str) -> list[dict[str, str]]:
    """The answer as message parts, with each calculator note as a tool call and its output."""
    parts: list[dict[str, str]] = []
    position = 0
    for note in _CALCULATOR_NOTE.finditer(answer):
        parts.append({"type": "text", "text": answer[position : note.start()]})
        parts.append({"type": "python", "text": note[1]})
        parts.append({"type": "python_output", "text": note[2]})
        position = note.end()
    parts.append({"type": "text", "text": answer[position:]})
    return [part for part in parts if part["text"]]


class GSM8K(Task):
    """Word problems; an answer is right if the number after its last "####" equals the reference."""

    name = "GSM8K"
    eval_type = "generative"

    def __init__(
        self,
        split: Literal["train", "test"],
        *,
        subset: Literal["main", "socratic"] = "main",
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        if subset not in ("main", "socratic"):
            raise ValueError(f"GSM8K has the subsets main and socratic, not {subset!r}")
        super().__init__(start=start, stop=stop, step=step)
        local_file = f"gsm8k/{split}.jsonl" if subset == "main" else f"gsm8k/{split}_socratic.jsonl"
        self.rows = load_rows("openai/gsm8k", subset, split, local_file, ("question", "answer"))

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": split_tool_calls(row["answer"])},
            ]
        }

    def evaluate(self, problem: Conversation, completion: str) -> bool:
        reference = extract_answer(problem["messages"][-1]["content"][-1]["text"])
        return reference is not None and extract_answer(completion) == reference

    def reward(self, problem: Conversation, completion: str) -> float:
        """1.0 for a right answer, else 0.0; reinforcement learning maximises it."""
        return float(self.evaluate(problem, completion))
