"""What the tasks of the demo world have in common: the form of a conversation, reading an answer, random draws."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, Literal

from tasks.common import Conversation, Task
from tasks.demo.phrasings import MEANT, drop_words, hand_typed, typed, wrap_request
from tasks.demo.world import World, has_keys, load_world

Split = Literal["train", "test"]
Content = str | list[dict[str, str]]


def conversation(*turns: tuple[str, Content], **extra: Any) -> Conversation:
    """A conversation of (question, answer) turns; `extra` holds what the judge needs."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def final_text(completion: str) -> str:
    """The assistant's text after its last tool result, without special tokens."""
    text = completion.split("<|output_end|>")[-1]
    text = re.sub(rf"^\s*{MEANT}[^?]*\?", "", text)  # how it was understood is no answer yet
    return re.sub(r"<\|[a-z_]+\|>", " ", text.split("<|assistant_end|>")[0]).strip()


def tool_calls(completion: str) -> list[str]:
    """The finished tool calls of a completion."""
    return re.findall(r"<\|python_start\|>(.*?)<\|python_end\|>", completion, flags=re.DOTALL)


class DemoTask(Task):
    """`size` examples from a world; the module's docstring explains the splits."""

    eval_type = "generative"

    def __init__(
        self,
        size: int,
        split: Split = "train",
        world: World | str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"{type(self).__name__} has the splits train and test, not {split!r}")
        super().__init__()
        self.size = size
        self.split: Split = split
        self.world = world if isinstance(world, World) else load_world(world)
        self.seed = seed

    @property
    def held_out(self) -> bool:
        """True if examples use what training never shows."""
        return self.split == "test"

    def num_examples(self) -> int:
        return self.size

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the last answer has the key words that it needs."""
        return int(has_keys(final_text(completion), problem["keys"]))

    def random(self, index: int) -> random.Random:
        """The random generator of example `index`; text seeds give the same numbers everywhere."""
        return random.Random(f"{type(self).__name__} {self.split} {self.seed} {index}")

    def as_typed(self, rng: random.Random, request: str, wrapped: float = 0.25, dropped: float = 0.1) -> str:
        """A training request: plain, wrapped or without its function words (in these shares), typed as people do."""
        return self.as_hand_typed(rng, request, wrapped, dropped)[0]

    def as_hand_typed(
        self, rng: random.Random, request: str, wrapped: float = 0.25, dropped: float = 0.1
    ) -> tuple[str, bool]:
        """(as `as_typed`, True if it has typing errors and all its words)."""
        kind = rng.random()
        if kind < wrapped:
            request = wrap_request(rng, request, held_out=False)
        elif kind < wrapped + dropped:
            return typed(rng, drop_words(rng, request), self.world.vocabulary), False
        return hand_typed(rng, request, self.world.vocabulary)
