"""Tasks: deterministic lists of conversations, with a judge for answers to them.

A conversation is a dict with "messages": [{"role": "user" | "assistant", "content": str | list of parts}, ...], the
form that the tokenizer renders. Training reads a task through `len(task)` and `task[i]`; evaluation also calls
`task.evaluate`. The same arguments give the same examples in the same order on every machine.

There are two ways to judge (`eval_type`):
- "categorical": a choice between letters. The conversation also has "letters"; the model's letter is the argmax over
  their logits, and that letter is what `evaluate` gets.
- "generative": the model writes an answer, and `evaluate` gets its whole text.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

Conversation = dict[str, Any]
EvalType = Literal["categorical", "generative"]


class Task:
    """A list of conversations, or every `step`-th of those in [start, stop). Subclasses define its content."""

    name: str = ""
    """The name of the task on the command line and in the report; by default the class name."""
    eval_type: EvalType = "generative"
    baseline: float = 0.0
    """Accuracy of random guessing, subtracted when scores are centered."""
    rows: Sequence[Any]

    def __init__(self, *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        """Raises ValueError for a slice that is not 0 <= start <= stop, step >= 1."""
        self.name = self.name or type(self).__name__
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(
                f"{self.name}: bad slice start={start} stop={stop} step={step}; use 0 <= start <= stop, step >= 1"
            )
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """Number of examples before slicing: of its `rows`, if it has a data set."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """The conversation at `index`, 0 <= index < num_examples()."""
        raise NotImplementedError

    def evaluate(self, problem: Conversation, completion: str) -> int | bool:
        """Returns True (or 1) if `completion` (a letter or a whole answer, see eval_type) solves `problem`."""
        raise NotImplementedError(f"{self.name} is a training task: it can't be evaluated")

    def reward(self, problem: Conversation, completion: str) -> float:
        """1.0 for a right answer, else 0.0; reinforcement learning maximises it."""
        return float(self.evaluate(problem, completion))

    def other_verdicts(self, problem: Conversation, completion: str) -> dict[str, bool]:
        """Whether an answer is right by rules besides `evaluate`, by name: none but where a public one differs."""
        return {}

    def __len__(self) -> int:
        total = self.num_examples()
        return len(range(self.start, total if self.stop is None else min(self.stop, total), self.step))

    def __getitem__(self, index: int) -> Conversation:
        size = len(self)
        if not -size <= index < size:  # IndexError is also what ends `for conversation in task`
            raise IndexError(f"{self.name} has {size} examples, asked for number {index}")
        return self.get_example(self.start + (index % size) * self.step)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))


class CodeTask(Task):
    """A task whose `evaluate` runs the code that a model wrote (nanochat/execution.py)."""

    allow_weak_isolation: bool = False
    """Run the code even on a machine that can't isolate it well; otherwise `evaluate` raises IsolationError there."""


class _Joined(Task):
    """Several tasks as one; subclasses choose the order."""

    def __init__(self, tasks: Sequence[Task], *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start=start, stop=stop, step=step)
        self.tasks = list(tasks)
        self.ends = list(accumulate(len(task) for task in self.tasks))  # ends[k]: examples in tasks 0..k together

    def num_examples(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _locate(self, position: int) -> tuple[int, int]:
        """(number of the task, number of its example) at `position` of the concatenated tasks."""
        k = bisect_right(self.ends, position)
        return k, position - (self.ends[k - 1] if k else 0)

    def get_example(self, index: int) -> Conversation:
        k, local_index = self._locate(index)
        return self.tasks[k][local_index]

    def evaluate(self, problem: Conversation, completion: str) -> int | bool:
        raise NotImplementedError(f"{self.name} mixes tasks: evaluate them one by one")


class TaskSequence(_Joined):
    """Tasks one after another, for a curriculum: all of the first, then all of the second, ..."""


class TaskMixture(_Joined):
    """Tasks shuffled together, each weighted by its size. To give a task double weight, list it twice."""

    def __init__(self, tasks: Sequence[Task], *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(tasks, start=start, stop=stop, step=step)
        self.order = shuffled_indices(super().num_examples())

    def get_example(self, index: int) -> Conversation:
        return super().get_example(self.order[index])


def shuffled_indices(count: int, seed: int = 42) -> array[int]:
    """0 .. count-1, shuffled by `seed` into the same order on every machine and Python version."""
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    return order


def letters_for(choices: Sequence[str]) -> tuple[str, ...]:
    """("A", "B", ...), one letter for each choice."""
    return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)])


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The text of a multiple choice question, ready to be a user message.

    Each letter follows its choice, directly after "=". So it has no space before it and is the same token as in the
    answer, and the model has read the choice before it reads the letter that names it.

    Raises:
        ValueError: the numbers of letters and choices differ.
    """
    if len(letters) != len(choices):
        raise ValueError(f"{len(choices)} choices need {len(choices)} letters, got {len(letters)}: {list(letters)}")
    options = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Choose the right answer: {question}\n{options}\nReply with its letter and nothing else."
