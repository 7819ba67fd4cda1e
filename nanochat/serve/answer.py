"""Reading an answer: from the model's tokens to parts a person can read.

A part is text (never half a character), what was sent to the calculator, or what it answered.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal

from nanochat.tokenizer import RustBPETokenizer

PartType = Literal["text", "python", "python_output"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer. Text comes in several pieces as it is written; the others come whole."""

    type: PartType
    text: str


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


def join_parts(parts: list[Part]) -> list[dict[str, str]]:
    """The parts of a whole answer as the content of an assistant message, neighbouring texts joined."""
    content: list[dict[str, str]] = []
    for part in parts:
        if part.type == "text" and content and content[-1]["type"] == "text":
            content[-1]["text"] += part.text
        else:
            content.append({"type": part.type, "text": part.text})
    return content
