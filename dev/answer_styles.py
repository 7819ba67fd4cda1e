"""How chat models write down a Python function: styles of answers, right and wrong ones, made from a known solution.

For dev/check_humaneval.py and the tests: whatever the style, the verdict must be that of the solution run plainly.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

FENCE = "```"


@dataclass(frozen=True)
class Known:
    """A solution."""

    name: str
    """Of the function."""
    code: str
    """All of it, with the signature."""
    body: str
    """What follows the prompt."""


def block(code: str, info: str = "python", fence: str = FENCE) -> str:
    """The code in fences."""
    return f"{fence}{info}\n{code}\n{fence}"


def session(code: str) -> str:
    """The code as it is typed into Python's prompt."""
    lines = []
    for statement in ast.parse(code).body:
        first, *rest = ast.unparse(statement).split("\n")
        lines += [f">>> {first}", *(f"... {line}" for line in rest), *(["..."] if rest else [])]
    return "\n".join(lines)


def draft(known: Known, *body: str) -> str:
    """A function of the same name that is wrong."""
    return f"def {known.name}(*a):\n    " + "\n    ".join(body)


STYLES: dict[str, Callable[[Known], str]] = {
    "sentences around": lambda k: f"Sure! Here is the function:\n\n{block(k.code)}\n\nIt runs in O(n).",
    "no language": lambda k: block(k.code, ""),
    "a title": lambda k: block(k.code, 'py title="a.py"'),
    "a space behind the language": lambda k: f"{FENCE}python \n{k.code}\n{FENCE}  \nok",
    "tildes": lambda k: f"{block(k.code, 'Python', '~~~')}\nDone.",
    "four backticks": lambda k: block(k.code, "python", "````"),
    "headings": lambda k: f"## Solution\n\n{block(k.code)}\n\n## Notes\n- O(n)",
    "usage before": lambda k: f"You use it so:\n\n{block(f'print({k.name}(1))')}\n\nThe function:\n\n{block(k.code)}",
    "a session before": lambda k: f"{block(f'>>> {k.name}(1){chr(10)}2', 'pycon')}\n{block(k.code)}",
    "a shell before": lambda k: f"{block('pip install numpy', 'bash')}\n{block(k.code)}",
    "the signature before": lambda k: f"{block(f'def {k.name}(*a):')}\nis filled in so:\n{block(k.code)}",
    "an outline before": lambda k: f"{block(draft(k, '...'))}\nis filled in so:\n{block(k.code)}",
    "output behind": lambda k: f"{block(k.code)}\nOutput:\n{block('True', '')}",
    "tests behind": lambda k: f"{block(k.code)}\nTests:\n{block(f'assert {k.name}(1) == 12345')}",
    "only a closing fence": lambda k: f"{k.code}\n{FENCE}",
    "only a closing fence, then sentences": lambda k: f"{k.code}\n{FENCE}\nThis is it.",
    "only an opening fence": lambda k: f"Here:\n{FENCE}python\n{k.code}",
    "closed on the last line": lambda k: f"{FENCE}python\n{k.code.rstrip()}{FENCE}",
    "closed on the last line, then words": lambda k: f"{FENCE}python\n{k.code.rstrip()}{FENCE} and that is it.",
    "no fence": lambda k: k.code,
    "no fence, sentences before": lambda k: f"Sure, this is the function.\n\n{k.code}",
    "no fence, sentences around": lambda k: (
        f"Sure, this is it.\n\n{k.code}\n\nIt reads the input once, and that is all."
    ),
    "no fence, statements behind": lambda k: f"{k.code}\n\nlow, high = 1, 2\nassert low < high\nprint('ok')",
    "a session": lambda k: block(session(k.code), "pycon"),
    "a main guard": lambda k: block(f"{k.code}\n\nif __name__ == '__main__':\n    print({k.name}(input()))"),
    "a main guard that exits": lambda k: block(f"import sys\n{k.code}\nif __name__ == '__main__':\n    sys.exit(1)"),
    "unit tests": lambda k: block(
        f"import unittest\n{k.code}\nclass T(unittest.TestCase):\n    def test(self):\n        assert {k.name}(1)\n"
        "if __name__ == '__main__':\n    unittest.main()"
    ),
    "tabs": lambda k: block(re.sub(r"^(?: {4})+", lambda m: "\t" * (len(m[0]) // 4), k.code, flags=re.MULTILINE)),
    "CRLF": lambda k: f"Here:\n{block(k.code)}\nOk.".replace("\n", "\r\n"),
    "a byte order mark": lambda k: f"\ufeff{k.code}",
    "thoughts": lambda k: f"<think>\nPerhaps:\n{block(draft(k, 'return 0'))}\nNo.\n</think>\n\n{block(k.code)}",
    "thoughts, opened elsewhere": lambda k: f"Perhaps:\n{block(draft(k, 'return 0'))}\n</think>\n{block(k.code)}",
    "thoughts without fences": lambda k: f"<thinking>\n{draft(k, 'return 0')}\nor so.\n</thinking>\n{k.code}",
    "alternatives": lambda k: f"1. Simple:\n{block(k.code)}\n2. Or:\n{block(draft(k, 'return 0'))}",
    "a diff": lambda k: block(
        f"--- a.py\n+++ a.py\n@@ -1,2 +1,9 @@\n-def {k.name}(*a):\n-    pass\n{textwrap.indent(k.code, '+', bool)}",
        "diff",
    ),
    "a numbered list": lambda k: f"1. Write:\n\n{textwrap.indent(block(k.code), '   ')}\n\n2. Run `python a.py`",
    "a numbered list, on its line": lambda k: f"1. {textwrap.indent(block(k.code), '   ').lstrip()}\n2. Run it.",
    "a quote": lambda k: textwrap.indent(block(k.code), "> ", bool).replace("> \n", ">\n"),
    "imports in a block": lambda k: (
        f"{block('import math' + chr(10) + 'from collections import Counter')}\nThen:\n"
        f"{block(k.code + chr(10) + '_used = Counter(), math.pi')}"
    ),
    "imports beside the block": lambda k: f"import bisect\n\n{block(k.code + chr(10) + '_used = bisect.bisect')}",
    "constants in a block": lambda k: (
        f"{block('MOD = 10 ** 9 + 7' + chr(10) + 'MEMO = dict()')}\n{block(k.code + chr(10) + '_used = MEMO, MOD')}"
    ),
    "a class in a block": lambda k: (
        f"{block('class Box:' + chr(10) + '    value = 0')}\n{block(k.code + chr(10) + '_used = Box.value')}"
    ),
    "a value in a block behind": lambda k: f"{block(k.code)}\n{block(f'result = {k.name}(int(input()))')}",
    "an instance": lambda k: block(
        f"{k.code}\n\nclass Solver:\n    def __init__(self, f):\n        self.f = f\n    def __call__(self, *a):\n"
        f"        return self.f(*a)\n\n{k.name} = Solver({k.name})"
    ),
    "a decorator": lambda k: block(
        "import functools\n\ndef same(f):\n    return functools.wraps(f)(lambda *a: f(*a))\n\n"
        + re.sub(rf"^def {k.name}\(", f"@same\ndef {k.name}(", k.code, flags=re.MULTILINE)
    ),
    "a lambda": lambda k: block(f"{k.code}\n\n_first = {k.name}\n{k.name} = lambda *a: _first(*a)"),
    "a fence in a text": lambda k: block(f'def _doc():\n    """\n    {FENCE}\n    x\n    {FENCE}\n    """\n\n{k.code}'),
    "tags": lambda k: f"<code>\n{k.code}\n</code>",
    "tags, with tests": lambda k: f"[PYTHON]\n{k.code}\n[/PYTHON]\n[TESTS]\nassert {k.name}(1)\n[/TESTS]",
    "a mark of the end": lambda k: f"{block(k.code)}<|im_end|>",
    "a body": lambda k: k.body,
    "a body in a block": lambda k: block(k.body),
    "a body, not indented": lambda k: block(textwrap.dedent(k.body)),
    "a body, then sentences": lambda k: f"{k.body}\n\nThis returns what was asked for.",
    "a body, then a function": lambda k: f"{k.body}\n\n\ndef other(x):\n    return x\n",
    "a body, then a main guard": lambda k: f"{k.body}\n\nif __name__ == '__main__':\n    print({k.name}(1))\n",
}


def answers(prompt: str, name: str, body: str) -> Iterator[tuple[str, bool, str, str]]:
    """(style, right or wrong, the answer, the solution as a plain program) of one problem in each style."""
    for style, write in STYLES.items():
        for right in (True, False):
            mine = body.strip("\n") if right else "    return None"
            code = f"{prompt}{mine}".strip("\n")
            yield style, right, write(Known(name, code, mine)), code
