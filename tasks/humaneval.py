"""HumanEval: write a Python function from its signature and docstring; judged by running its tests.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", https://arxiv.org/abs/2107.03374
Data set: openai/openai_humaneval on the hub, or humaneval/HumanEval.jsonl under NANOCHAT_TASK_DIR.
"""

from __future__ import annotations

import ast
import re
import textwrap

from nanochat.execution import check_function
from tasks.common import CodeTask, Conversation
from tasks.sources import load_rows

# Anything may follow the opening fence: models write python3, Python or a title there.
_CODE_BLOCK = re.compile(r"(```|~~~)[^\n`]*\n(.*?)(?:\n[ \t]*\1|\Z)", re.DOTALL)
# How a line of code begins, in an answer that mixes it with sentences.
_CODE_LINE = re.compile(
    r"\s|$|[@#)\]}'\"]|(?:async +)?(?:def|class|with|for) |import [\w.]+|from [\w.]+ import |(?:if|elif|while) .*:|"
    r"(?:else|try|finally):|except\b.*:|(?:return|assert|raise|print)\b|\w[\w.]*(?:\[.*\])? *(?:[(=]|[-+*/|&]=|: )"
)


def defines(entry_point: str) -> re.Pattern[str]:
    """Return a pattern that finds the definition of a function at the top level of a source."""
    name = re.escape(entry_point)
    return re.compile(rf"^(?:(?:async +)?def +{name}\b|class +{name}\b|{name} *(?::[^=\n]+)?=(?!=))", re.MULTILINE)


def extract_code(completion: str, entry_point: str = "") -> str:
    """Return the code of an answer: its first fenced block, or the first that defines `entry_point` if one does.

    Blocks that only import or define what that one lacks stand before it.
    An answer without a block is code as a whole, except for sentences around a definition; so is what stands before
    a fence that closes a block which was never opened.
    """
    completion = completion.replace("\r\n", "\n")
    definition, blocks = defines(entry_point), []
    for block in _CODE_BLOCK.finditer(completion):
        before = completion[: block.start()].rpartition("\n")[2]
        indent = before if before.isspace() else ""  # a block inside a list is indented
        blocks.append("\n".join(line.removeprefix(indent) for line in block[2].split("\n")))
    if not entry_point:
        return blocks[0] if blocks else completion
    for code in blocks:
        if definition.search(code):
            return _with_helpers(code, blocks)
    outside = _CODE_BLOCK.split(completion, 1)[0]  # before the first fence, if there is one
    if not definition.search(outside):
        is_body = outside.strip() and outside.lstrip("\n")[0].isspace()
        return blocks[0] if blocks and not is_body else outside
    lines = outside.split("\n")
    start = stop = next(i for i, line in enumerate(lines) if definition.match(line))
    while start > 0 and _CODE_LINE.match(lines[start - 1]):
        start -= 1
    if _CODE_LINE.match(outside.lstrip()):  # no sentence before the code, but perhaps one within a string
        start = 0
    open_quotes = False  # a string of several lines may hold sentences
    while stop < len(lines) and (open_quotes or _CODE_LINE.match(lines[stop])):
        open_quotes ^= (lines[stop].count('"""') + lines[stop].count("'''")) % 2 == 1
        stop += 1
    return "\n".join(lines[start:stop])


def _with_helpers(code: str, blocks: list[str]) -> str:
    """A block after those beside it that only import or define names, none of which it or another has defined."""
    known = _defined(code, only=False) or set()
    helpers = []
    for block in blocks:
        names = _defined(block, only=True)
        if names and block != code and not names & known:
            known |= names
            helpers.append(block)
    # An import from __future__ must stay the first statement.
    return "\n".join([*helpers, code]) if helpers and "from __future__" not in code else code


def _defined(code: str, only: bool) -> set[str] | None:
    """The names that a source imports or defines at its top level; None if it can't be read, or (`only`) does more."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        elif only:
            return None
    return names


def build_solution(prompt: str, entry_point: str, completion: str) -> str:
    """Return the source that defines the function: the answer's code after the imports and helpers of the prompt.

    An answer that does not define the function itself is taken as its body, which continues the prompt.
    """
    code = extract_code(completion, entry_point)
    definition = defines(entry_point)
    if not definition.search(code):
        return prompt + "\n" + _indented(code) + "\n"
    start = definition.search(prompt)
    return prompt[: start.start() if start else 0] + "\n" + code + "\n"


def _indented(body: str) -> str:
    """A function's body with the indentation that a model may have left out, in its first line or in all."""
    first, newline, rest = body.lstrip("\n").partition("\n")
    if not first.strip() or first[0].isspace():
        return body
    depths = [len(line) - len(line.lstrip()) for line in rest.split("\n") if line.strip()]
    deeper = 8 if first.rstrip().endswith(":") else 4
    if depths and min(depths) >= 4 and depths[0] >= deeper:
        return "    " + first + newline + rest  # the others have it
    return textwrap.indent(first + newline + rest, "    ")


class HumanEval(CodeTask):
    """Python functions to write. Runs the model's code in the sandbox of nanochat/execution.py.

    If the isolation is weak, `evaluate` raises IsolationError unless `allow_weak_isolation` is true.
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
