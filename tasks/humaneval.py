"""HumanEval: write a Python function from its signature and docstring; judged by running its tests.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", https://arxiv.org/abs/2107.03374
Data set: openai/openai_humaneval on the hub, or humaneval/HumanEval.jsonl under NANOCHAT_TASK_DIR.
"""

from __future__ import annotations

import re

from nanochat.execution import execute_code
from tasks.common import Conversation, Task
from tasks.sources import load_rows

_CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def extract_code(completion: str) -> str:
    """The first fenced code block of an answer, or the whole answer when it has none."""
    block = _CODE_BLOCK.search(completion)
    return block[1] if block else completion


def build_program(prompt: str, entry_point: str, completion: str, test: str) -> str:
    """A program that defines the answer and runs the tests; it reaches its last line only when all of them passed.

    The prompt's imports and helper functions come first, because the tests may use them. An answer that does not define
    the function itself continues the prompt: its body alone.
    """
    code = extract_code(completion)
    definition = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    if definition.search(code):
        start = definition.search(prompt)
        solution = prompt[: start.start() if start else 0] + "\n" + code
    else:
        solution = prompt + "\n" + code
    return f"{solution}\n\n{test}\n\ncheck({entry_point})\n"


class HumanEval(Task):
    """Python functions to write. Runs the model's code: see nanochat/execution.py for what contains it."""

    name = "HumanEval"
    eval_type = "generative"

    def __init__(self, *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
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
        prompt = problem["messages"][0]["content"]
        # success means that the last line was reached: leaving before the tests (sys.exit) is none.
        return execute_code(build_program(prompt, problem["entry_point"], completion, problem["test"])).success
