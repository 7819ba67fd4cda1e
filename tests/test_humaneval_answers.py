"""Answers in the styles of chat models: whatever is written around it, the code gets the verdict of a plain run."""

import contextlib
import io
import time

import pytest

from dev.answer_styles import STYLES, answers
from tasks.humaneval import HumanEval, build_solution

# (prompt, function, body, tests)
PROBLEMS = [
    (
        'from typing import List\n\n\ndef largest(values: List[int]) -> int:\n    """ The largest value.\n'
        '    >>> largest([1, 3, 2])\n    3\n    """\n',
        "largest",
        "    best = values[0]\n    for value in values[1:]:\n        if value > best:\n            best = value\n"
        "    return best\n",
        "def check(f):\n    assert f([1, 3, 2]) == 3\n    assert f([-1]) == -1\n",
    ),
    (
        'def add_two(x: int) -> int:\n    return x + 2\n\n\ndef add_four(x):\n    """ x + 4, by add_two """\n',
        "add_four",
        "    return add_two(\n        add_two(x))\n",
        "def check(f):\n    assert f(1) == 5\n",
    ),
    (
        "\ndef initials(name):\n    '''\n    The first letters, e.g. \"A B\" for \"Ada Byron\"\n    '''\n",
        "initials",
        "    letters = [word[0] for word in name.split()]\n    return ' '.join(letters)\n",
        "def check(f):\n    assert f('Ada Byron') == 'A B'\n    assert f('') == ''\n",
    ),
]
CASES = [(number, *case) for number, problem in enumerate(PROBLEMS) for case in answers(*problem[:3])]


def passes(program, tests, name):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(f"{program}\n{tests}\ncheck({name})\n", {"__name__": "solution"})
    except Exception:
        return False
    return True


@pytest.mark.parametrize("style", STYLES)
def test_the_verdict_is_that_of_the_code_run_plainly(style):
    mine = [case for case in CASES if case[1] == style]
    assert len(mine) == 2 * len(PROBLEMS)
    for number, _, right, answer, code in mine:
        prompt, name, _, tests = PROBLEMS[number]
        plain = passes(prompt[: prompt.index(f"def {name}")] + code, tests, name)
        assert plain == right
        assert passes(build_solution(prompt, name, answer), tests, name) == right, answer


@pytest.mark.parametrize("style", ["thoughts", "a session", "closed on the last line", "a body, then sentences"])
def test_the_sandbox_gives_the_same_verdict(style):
    task = HumanEval.__new__(HumanEval)
    task.allow_weak_isolation = True
    prompt, name, _, tests = PROBLEMS[0]
    problem = {"messages": [{"role": "user", "content": prompt}], "entry_point": name, "test": tests}
    verdicts = {
        right: task.evaluate(problem, answer) for _, s, right, answer, _ in CASES[: 2 * len(STYLES)] if s == style
    }
    assert verdicts == {True: True, False: False}


def test_no_answer_is_found_in_thoughts_alone():
    prompt, name, body, tests = PROBLEMS[0]
    thought = f"<think>\n```python\n{prompt}{body}```\n</think>\n"
    assert not passes(build_solution(prompt, name, thought), tests, name)


@pytest.mark.parametrize("noise", ["```python\nx = (\n" + "```\n" * 2000, "`" * 50_000, "~" * 50_000, "</think" * 9000])
def test_what_repeats_takes_no_time(noise):
    prompt, name, body, _ = PROBLEMS[0]
    start = time.process_time()
    build_solution(prompt, name, f"{noise}\n```python\n{prompt}{body}\n```")
    assert time.process_time() - start < 10  # minutes, if all were tried in all places
