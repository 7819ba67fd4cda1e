"""HumanEval: write a Python function from its signature and docstring; judged by running its tests.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", https://arxiv.org/abs/2107.03374
Data set: openai/openai_humaneval on the hub, or humaneval/HumanEval.jsonl under NANOCHAT_TASK_DIR.
"""

from __future__ import annotations

import re

from nanochat.execution import check_function
from tasks.common import CodeTask, Conversation
from tasks.sources import load_rows

# Whatever stands behind the opening fence: models write python3, Python or a title there.
_CODE_BLOCK = re.compile(r"(```|~~~)[^\n`]*\n(.*?)(?:\n[ \t]*\1|\Z)", re.DOTALL)


def extract_code(completion: str) -> str:
    """The first fenced code block of an answer, or the whole answer when it has none."""
    completion = completion.replace("\r\n", "\n")
    block = _CODE_BLOCK.search(completion)
    if block is None:
        return completion
    before = completion[: block.start()].rpartition("\n")[2]
    indent = before if before.isspace() else ""  # a block inside a list stands further right
    return "\n".join(line.removeprefix(indent) for line in block[2].split("\n"))


def build_solution(prompt: str, entry_point: str, completion: str) -> str:
    """The source that defines the answer's function: the answer's code behind the prompt's imports and helpers.

    An answer that does not define the function itself continues the prompt: its body alone.
    """
    code = extract_code(completion)
    definition = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    if not definition.search(code):
        return prompt + "\n" + code + "\n"
    start = definition.search(prompt)
    return prompt[: start.start() if start else 0] + "\n" + code + "\n"


class HumanEval(CodeTask):
    """Python functions to write. Runs the model's code: see nanochat/execution.py for what contains it.

    Where that is weak, `evaluate` raises IsolationError unless `allow_weak_isolation` is true.
    """

    name = "HumanEval"
    eval_type = "generative"

    def __init__(
        self, *, start: int = 0, stop: int | None = None, step: int = 1, allow_weak_isolation: bool = False
    ) -> None:
        self.allow_weak_isolation = allow_weak_isolation
        super().__init__(start=start, stop=stop, step=step)
        self.rows = load_rows(
            "openai/openai_humaneval",
            None,
            "test",
            "humaneval/HumanEval.jsonl",
            ("prompt", "canonical_solution", "test", "entry_point"),
        )

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["prompt"] + "\n" + row["canonical_solution"]},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, problem: Conversation, completion: str) -> bool:
        prompt, entry_point = problem["messages"][0]["content"], problem["entry_point"]
        return check_function(
            build_solution(prompt, entry_point, completion),
            entry_point,
            f"{problem['test']}\n\ncheck({entry_point})\n",
            prompt,  # its helper functions, which some tests call
            allow_weak_isolation=self.allow_weak_isolation,
        ).success
