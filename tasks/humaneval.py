"""HumanEval: write a Python function from its signature and docstring; judged by running its tests.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", https://arxiv.org/abs/2107.03374
Data set: openai/openai_humaneval on the hub, or humaneval/HumanEval.jsonl under NANOCHAT_TASK_DIR.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import re
import textwrap
from itertools import islice

from nanochat.execution import check_function
from tasks.common import CodeTask, Conversation
from tasks.sources import load_rows

# Ends what a model thought before it answered; the opening tag may be part of the prompt.
_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|reasoning|analysis)>", re.IGNORECASE)
# Anything may follow the opening fence: models write python3, Python or a title there.
_OPENING = re.compile(r"((?<!`)`{3,}(?!`)|(?<!~)~{3,}(?!~))([^\n`]*)\n")
_NO_CHANGE = re.compile(r"-|@@|\+\+\+ |diff |index |\\")  # lines of a diff that are not in its new text
MAX_CLOSINGS = 8  # fences that are tried as the end of a block
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

    An outline (a block that can't be read, or whose function has an empty body) is passed over for a later block. Those
    that only import or define what that one lacks stand before it, and so do imports beside the blocks.
    An answer without a block is code as a whole, except for sentences around a definition or behind a body; so is what
    stands before a fence that closes a block which was never opened. What a model thought is left out.
    """
    completion = _THOUGHTS_END.split(completion.replace("\r\n", "\n").removeprefix("\ufeff"))[-1]
    definition, (blocks, beside) = defines(entry_point), _blocks(completion)
    if not entry_point:
        return blocks[0] if blocks else completion
    if solutions := [code for code in blocks if definition.search(code)]:
        code = next((code for code in solutions if not _is_outline(code, entry_point)), solutions[0])
        imports = [line for line in beside.split("\n") if line.startswith(("import ", "from "))]
        return _with_helpers(code, imports + blocks)
    outside = _OPENING.split(completion + "\n", maxsplit=1)[0]  # before the first fence, if there is one
    lines = outside.split("\n")
    if definition.search(outside):
        if _parse(outside) is not None:
            return outside
        start = stop = next(i for i, line in enumerate(lines) if definition.match(line))
        while start > 0 and _CODE_LINE.match(lines[start - 1]):
            start -= 1
        if _CODE_LINE.match(outside.lstrip()):  # no sentence before the code, but perhaps one within a string
            start = 0
    elif outside.strip() and outside.lstrip("\n")[0].isspace():  # a body
        start = stop = 0
    else:
        return blocks[0] if blocks else outside
    open_quotes = False  # a string of several lines may hold sentences
    while stop < len(lines) and (open_quotes or _CODE_LINE.match(lines[stop])):
        open_quotes ^= (lines[stop].count('"""') + lines[stop].count("'''")) % 2 == 1
        stop += 1
    return "\n".join(lines[start:stop])


def _blocks(answer: str) -> tuple[list[str], str]:
    """The code in the fences of an answer, and what stands beside them."""
    blocks, beside, place = [], "", 0
    while opening := _OPENING.search(answer, place):
        ends = islice(re.compile(opening[1]).finditer(answer, opening.end()), MAX_CLOSINGS)
        spans = [end.span() for end in ends] or [(len(answer), len(answer))]
        lead = answer[answer.rfind("\n", 0, opening.start()) + 1 : opening.start()]
        found = [_without_lead(answer[opening.end() : stop].rstrip(), lead, opening[2]) for stop, _ in spans]
        # A fence within a string does not end the block: the first end that leaves Python does.
        number = next((i for i, code in enumerate(found) if _parse(textwrap.dedent(code)) is not None), 0)
        blocks.append(found[number])
        beside += answer[place : opening.start()] + "\n"
        place = spans[number][1]
    return blocks, beside + answer[place:]


def _without_lead(code: str, lead: str, info: str) -> str:
    """A block's code without what is before its lines: `lead` in a list or quote, a diff's signs, a session's `>>>`."""
    if not lead.strip(" \t>"):
        code = "\n".join(
            line[len(lead) :] if line.startswith(lead) else line.removeprefix(lead.rstrip())
            for line in code.split("\n")
        )
    else:
        code = textwrap.dedent(code)
    if info.strip().lower() in ("diff", "patch"):
        code = "\n".join(line[1:] for line in code.split("\n") if not _NO_CHANGE.match(line))
    if code.lstrip().startswith(">>> "):
        with contextlib.suppress(ValueError):  # no session after all
            code = "".join(example.source for example in doctest.DocTestParser().get_examples(code))
    return code


def _with_helpers(code: str, others: list[str]) -> str:
    """A block after those of `others` that only import or define names, none of which it or another has defined."""
    statements = _parse(code) or []
    known = {name for statement in statements for name in _defined(statement, {"input"}) or ()}
    uses, helpers = known | {"input"}, []  # a value that is computed by these is a use of the code, no part of it
    for other in others:
        defined = [_defined(statement, uses) for statement in _parse(other) or ()]
        names = {name for some in defined if some for name in some}
        if names and None not in defined and other != code and not names & known:
            known |= names
            helpers.append(other)
    # An import from __future__ must stay the first statement.
    return "\n".join([*helpers, code]) if helpers and "from __future__" not in code else code


def _is_outline(code: str, entry_point: str) -> bool:
    """Tell if a source can't be read, or says nothing of what the function does."""
    statements = _parse(code)
    return statements is None or any(
        isinstance(statement, ast.FunctionDef)
        and statement.name == entry_point
        and all(
            isinstance(line, ast.Pass | ast.Raise)
            or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            for line in statement.body
        )
        for statement in statements
    )


def _parse(code: str) -> list[ast.stmt] | None:
    """The statements of a source; None if it can't be read."""
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(statement: ast.stmt, uses: set[str]) -> set[str] | None:
    """The names that a statement imports or defines; None if it does something else, or calls one of `uses`."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        called = {
            node.func.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if all(isinstance(target, ast.Name) for target in targets) and not called & uses:
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return None


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
