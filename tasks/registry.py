"""The tasks that `chat_eval -a` knows by name, built only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nanochat.execution import IsolationError, require_isolation
from tasks.common import CodeTask, Task


def _arc_easy() -> Task:
    from tasks.arc import ARC

    return ARC("ARC-Easy", "test")


def _arc_challenge() -> Task:
    from tasks.arc import ARC

    return ARC("ARC-Challenge", "test")


def _mmlu() -> Task:
    from tasks.mmlu import MMLU

    return MMLU("all", "test")


def _gsm8k() -> Task:
    from tasks.gsm8k import GSM8K

    return GSM8K("test")


def _humaneval() -> Task:
    from tasks.humaneval import HumanEval

    return HumanEval()


def _spellingbee() -> Task:
    from tasks.spellingbee import SpellingBee

    return SpellingBee(size=256, split="test")


# The order is the order of the report.
CLASSIC_TASKS: Mapping[str, Callable[[], Task]] = {
    "ARC-Easy": _arc_easy,
    "ARC-Challenge": _arc_challenge,
    "MMLU": _mmlu,
    "GSM8K": _gsm8k,
    "HumanEval": _humaneval,
    "SpellingBee": _spellingbee,
}


def demo_tasks() -> dict[str, Task]:
    """The evaluation tasks of the demo world."""
    from tasks.demo.chat import demo_eval_tasks

    return demo_eval_tasks()


def _demo_word_sums() -> Task:
    from tasks.demo.wordsums import DemoWordSums

    return DemoWordSums(400, "test")


# Evaluated only when asked for: what chat_rl learns from in the demo world.
TASKS_ON_REQUEST: Mapping[str, Callable[[], Task]] = {"DemoWordSums": _demo_word_sums}


def get_task(name: str, *, allow_weak_isolation: bool = False) -> Task:
    """The evaluation task called `name` (any case): a classic one, else one of the demo world.

    Raises:
        ValueError: no such task; lists those there are.
        FileNotFoundError: its data can't be had.
        IsolationError: it runs code, which this machine can't shut off well, and that is not allowed.
    """
    for known, build in [*CLASSIC_TASKS.items(), *TASKS_ON_REQUEST.items()]:
        if known.lower() == name.lower():
            task = build()
            if isinstance(task, CodeTask):
                require_isolation(allow_weak_isolation)
                task.allow_weak_isolation = allow_weak_isolation
            return task
    demo = demo_tasks()
    for known, task in demo.items():
        if known.lower() == name.lower():
            return task
    raise ValueError(f"no task called {name!r}; there are {', '.join([*CLASSIC_TASKS, *demo, *TASKS_ON_REQUEST])}")


def load_available(names: list[str], *, allow_weak_isolation: bool = False) -> tuple[dict[str, Task], dict[str, str]]:
    """(tasks that could be loaded by name, why each of the others could not)."""
    tasks: dict[str, Task] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            tasks[name] = get_task(name, allow_weak_isolation=allow_weak_isolation)
        except (FileNotFoundError, IsolationError) as error:
            unavailable[name] = str(error)
    return tasks, unavailable
