"""What the command line and the web page share: fitting a conversation into the context, and reading an answer.

The model's answer comes as tokens. `AnswerReader` turns them into parts a person can read: text (never half a
character), what was sent to the calculator, and what it answered.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.engine import Engine
from nanochat.tokenizer import RustBPETokenizer

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": ...} as in RustBPETokenizer
PartType = Literal["text", "python", "python_output"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer. Text comes in several pieces as it is written; the others come whole."""

    type: PartType
    text: str


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is chosen."""

    temperature: float = 0.6
    top_k: int | None = 50
    max_tokens: int = 512
    seed: int = 42


class AnswerReader:
    """Turns the tokens of one answer into parts. Special tokens never show; nor do bytes that form no character."""

    def __init__(self, tokenizer: RustBPETokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.encode_special
        self._special = {special(name) for name in tokenizer.get_special_tokens()}
        self._opens: dict[int, PartType] = {special("<|python_start|>"): "python"}
        self._opens[special("<|output_start|>")] = "python_output"
        self._closes = {special("<|python_end|>"), special("<|output_end|>")}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._inside: PartType | None = None
        self._held: list[int] = []

    def read(self, token: int) -> Part | None:
        """The part that `token` completes, if any."""
        if token not in self._special:
            if self._inside is not None:
                self._held.append(token)
                return None
            text = self._decoder.decode(self._tokenizer.decode_bytes([token]))
            return Part("text", text) if text else None
        self._decoder.reset()
        if token in self._opens:
            self._inside, self._held = self._opens[token], []
        elif token in self._closes and self._inside is not None:
            part = Part(self._inside, self._tokenizer.decode(self._held))
            self._inside = None
            return part
        return None


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


def join_parts(parts: list[Part]) -> list[dict[str, str]]:
    """The parts of a whole answer as the content of an assistant message, neighbouring texts joined."""
    content: list[dict[str, str]] = []
    for part in parts:
        if part.type == "text" and content and content[-1]["type"] == "text":
            content[-1]["text"] += part.text
        else:
            content.append({"type": part.type, "text": part.text})
    return content


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
