"""What the command line and the web page share: fitting a conversation into the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nanochat.answer import AnswerReader, Part, join_parts
from nanochat.engine import Engine
from nanochat.tokenizer import RustBPETokenizer

__all__ = ["AnswerReader", "AnswerSettings", "Part", "answer", "answer_room", "fit_context", "join_parts"]

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": ...} as in RustBPETokenizer


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is chosen."""

    temperature: float = 0.6
    top_k: int | None = 50
    max_tokens: int = 512
    seed: int = 42


def answer(
    engine: Engine,
    tokenizer: RustBPETokenizer,
    prompt: list[int],
    settings: AnswerSettings,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Part]:
    """Stream the parts of the answer to a prompt (see `fit_context`). It ends early when `stopped()` says so."""
    reader = AnswerReader(tokenizer)
    columns = engine.generate(
        prompt,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    for column, _ in columns:
        if stopped():
            return
        part = reader.read(column[0])
        if part is not None:
            yield part


def answer_room(context_length: int, max_tokens: int) -> int:
    """How much of the context is kept free for an answer: what was asked for, at most a quarter."""
    return max(1, min(max_tokens, context_length // 4))


def fit_context(tokenizer: RustBPETokenizer, messages: list[Message], room: int) -> tuple[list[int], int]:
    """The prompt of a conversation that ends with the user, in at most `room` tokens.

    The oldest exchanges are left out as needed; a system message stays.

    Returns:
        (tokens, number of messages left out).

    Raises:
        ValueError: the messages are malformed, the last is not the user's, or it is too long by itself.
    """
    sizes = [len(ids) for ids, _ in tokenizer.render_turns({"messages": messages})]
    if messages[-1]["role"] != "user":
        raise ValueError("the last message must be the user's")
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    system_size = len(tokenizer.encode(system[0]["content"])) if system else 0
    left_out = 0
    while True:
        # The first turn's size holds bos and the system message; without it the next one gets them.
        extra = 0 if left_out == 0 else 1 + system_size
        if sum(sizes[left_out:]) + extra < room:
            tokens = tokenizer.render_for_completion({"messages": [*system, *turns[left_out:]]})
            if len(tokens) <= room:
                return tokens, left_out
        left_out += 2
        if left_out >= len(turns):
            raise ValueError(
                f"the message is too long: with {sizes[-1]} tokens it does not fit into the {room} tokens "
                "the model's context has for it; shorten it"
            )
