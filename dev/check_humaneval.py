"""Check that HumanEval's own solutions all pass, and that none passes when its body is `pass`.

NANOCHAT_TASK_DIR=... python -m dev.check_humaneval                the solutions
NANOCHAT_TASK_DIR=... python -m dev.check_humaneval --variants     also 4 variants of each, by the public harness's rule
NANOCHAT_TASK_DIR=... python -m dev.check_humaneval --styles       also answers as chat models write them, likewise

That rule (https://github.com/openai/human-eval): prompt, completion and tests are one program, run by `exec` in an
empty namespace; a program that raises nothing passes. The variants are made from HumanEval's own solutions, so they may
run without a sandbox: two with one operator, comparison or number changed, one written in another style, one that
returns another type.
"""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dev.answer_styles import STYLES, answers
from nanochat.config import run_script
from nanochat.execution import isolation
from tasks.humaneval import HumanEval


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the check."""

    workers: int = 2
    """Programs that run at the same time."""
    variants: bool = False
    """Also compare 4 variants of each solution with the verdict of the public harness."""
    styles: bool = False
    """Also compare a right and a wrong answer to each problem, in every style of dev/answer_styles.py by turns."""


# What stands behind a solution's function f.
ENDINGS = [
    "\n\nif __name__ == '__main__':\n    print(f(*input().split()))\n",
    "\n\nif __name__ == '__main__':\n    import sys\n    sys.exit(f())\n",
    "\n\nimport functools\nf = functools.wraps(f)(lambda *a, g=f, **k: g(*a, **k))\n",
    "\n\nfrom concurrent.futures import ThreadPoolExecutor\ndef in_thread(*a, g=f):\n"
    "    with ThreadPoolExecutor() as pool:\n        return pool.submit(g, *a).result()\nf = in_thread\n",
    "\n\nclass Solution:\n    def __call__(self, *a, g=f):\n        return g(*a)\nf = Solution()\n",
]
# Each with `r`, what the solution returns.
TYPES = [
    "__import__('fractions').Fraction(r) if type(r) in (int, float) else r",
    "__import__('decimal').Decimal(r) if type(r) is int else r",
    "(x for x in r) if type(r) in (list, tuple) else r",
    "tuple(r) if type(r) is list else r",
    "list(r) if type(r) is tuple else r",
    "int(r) if type(r) is bool else r",
    "float(r) if type(r) is int else r",
    "__import__('collections').deque(r) if type(r) is list else r",
    "type('S', (str,), {})(r) if type(r) is str else r",
    "r.encode() if type(r) is str else r",
]


def mutant(source: str, rng: random.Random) -> str:
    """`source` with one comparison, operator or number changed."""
    tree = ast.parse(source)
    changes: list[Callable[[], None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            other = rng.choice([ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq])()
            changes.append(lambda node=node, other=other: node.ops.__setitem__(0, other))
        elif isinstance(node, ast.BinOp | ast.AugAssign):
            operator = rng.choice([ast.Add, ast.Sub, ast.Mult, ast.FloorDiv])()
            changes.append(lambda node=node, operator=operator: setattr(node, "op", operator))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            changed = node.value + rng.choice([-1, 1])
            changes.append(lambda node=node, changed=changed: setattr(node, "value", changed))
    if changes:
        rng.choice(changes)()
    return ast.unparse(tree)


def variants(task: HumanEval, index: int) -> list[str]:
    """Programs for one problem, right and wrong."""
    problem, rng = task[index], random.Random(index)
    name, source = problem["entry_point"], problem["messages"][1]["content"]
    style = re.sub(r"\bf\b(?!')", name, ENDINGS[index % len(ENDINGS)])
    other_type = f"\n\ndef other_type(*a, g={name}):\n    r = g(*a)\n    return {TYPES[index % len(TYPES)]}\n"
    return [mutant(source, rng), mutant(source, rng), source + style, f"{source}{other_type}{name} = other_type\n"]


def passes_elsewhere(problem: dict, code: str) -> bool:
    """The verdict of the public harness, whose programs see no input and may take 10 seconds."""
    program = f"{code}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    run = f"try:\n    exec({program!r}, {{}})\nexcept BaseException:\n    raise SystemExit(1)\nprint('passed')"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", run], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and done.stdout.endswith(b"passed\n")


def judge(task: HumanEval, bodies: list[str], workers: int) -> list[bool]:
    """Judge one completion per problem."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda i: task.evaluate(task[i], bodies[i]), range(len(task))))


def styled(task: HumanEval, index: int) -> list[tuple[int, str, str]]:
    """(problem, answer, its code) of a right and a wrong answer to one problem, in two of the styles."""
    problem = task[index]
    prompt, name = problem["messages"][0]["content"], problem["entry_point"]
    body = problem["messages"][1]["content"].removeprefix(prompt + "\n")
    found = [(index, answer, code) for _, _, answer, code in answers(prompt, name, body)]
    return [found[2 * ((7 * index + wrong) % len(STYLES)) + wrong] for wrong in (0, 1)]


def compare(task: HumanEval, workers: int, found: list[tuple[int, str, str]]) -> int:
    """Judge answers here, and their codes by the public harness's rule; return how often the two differ."""

    def both(answer: tuple[int, str, str]) -> tuple[bool, bool]:
        problem = task[answer[0]]
        return task.evaluate(problem, answer[1]), passes_elsewhere(problem, answer[2])

    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(both, found))
    different = [(answer, verdict) for answer, verdict in zip(found, verdicts, strict=True) if verdict[0] != verdict[1]]
    print(
        f"{len(found)} answers: {sum(there for _, there in verdicts)} pass elsewhere; {len(different)} verdicts differ"
    )
    for (index, completion, _), (here, there) in different:
        print(f"--- {task[index]['entry_point']}: here {here}, elsewhere {there}\n{completion}")
    return len(different)


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
    found = []
    if cfg.variants:
        found += [(i, f"```python\n{code}\n```", code) for i in range(len(task)) for code in variants(task, i)]
    if cfg.styles:
        found += [answer for i in range(len(task)) for answer in styled(task, i)]
    different = compare(task, cfg.workers, found) if found else 0
    if not all(right) or any(wrong) or different:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, Config)
