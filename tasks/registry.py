"""The evaluation tasks that `chat_eval -a` knows by name; each is built, and its data loaded, only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nanochat.execution import IsolationError, require_isolation
from tasks.arc import ARC
from tasks.common import CodeTask, Task
from tasks.demo.chat import demo_eval_tasks
from tasks.demo.wordsums import DemoWordSums
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee

# In the order of the report.
CLASSIC_TASKS: Mapping[str, Callable[[], Task]] = {
    "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
    "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
    "MMLU": lambda: MMLU("all", "test"),
    "GSM8K": lambda: GSM8K("test"),
    "HumanEval": HumanEval,
    "SpellingBee": lambda: SpellingBee(size=256, split="test"),
}
# Evaluated only on request: the task that chat_rl trains on in the demo world.
TASKS_ON_REQUEST: Mapping[str, Callable[[], Task]] = {"DemoWordSums": lambda: DemoWordSums(400, "test")}


def demo_tasks() -> dict[str, Task]:
    """The evaluation tasks of the demo world."""
    return demo_eval_tasks()


def get_task(
    name: str, *, allow_weak_isolation: bool = False, demo_tasks: Callable[[], Mapping[str, Task]] = demo_tasks
) -> Task:
    """The evaluation task called `name` (any case): a classic one, else one of `demo_tasks`, all made for one of them.

    Raises:
        ValueError: there is no such task; lists all of them.
        FileNotFoundError: its data is unavailable.
        IsolationError: it runs code, this machine can't isolate that well, and weak isolation is not allowed.
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
    """(loaded tasks by name, the reason for each that is unavailable)."""
    tasks: dict[str, Task] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            tasks[name] = get_task(name, allow_weak_isolation=allow_weak_isolation)
        except (FileNotFoundError, IsolationError) as error:
            unavailable[name] = str(error)
    return tasks, unavailable
