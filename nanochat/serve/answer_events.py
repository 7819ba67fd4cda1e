"""An answer as a series of events: pieces of text, calls of the calculator and their results, and how it ended."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.generate.logprobs import TokenLogprob
from nanochat.generate.sequence import FinishReason
from nanochat.tokenizer import RustBPETokenizer

PartKind = Literal["text", "python", "python_output"]


@dataclass(frozen=True)
class Usage:
    """The tokens that a generation has cost so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt: found in the cache, not computed again


@dataclass(frozen=True)
class Event:
    """One thing that happened to a generation.

    Every generation ends with exactly one "done" or "error" event and none after it.
    """

    kind: PartKind | Literal["prompt", "work", "done", "error"]
    """"text": a piece of the answer. "python": a whole expression sent to the calculator; "python_output": its whole
    result. "prompt", before all others and only where it was asked for: tokens and log-probabilities of the prompt.
    "work": see `plain_answer`. "done": the answer is complete. "error": it failed, `text` says why."""
    text: str = ""
    """Whole characters only, never a special token."""
    tokens: tuple[int, ...] = ()
    """The new tokens since the last event, special and forced ones included, but not those of a withheld guess."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each of `tokens`, where `Sampling.logprobs` asks for them."""
    finish_reason: FinishReason | None = None
    """Of the last event: "stop" (the model ended it, or a stop text), "length", "cancelled" or "error"."""
    usage: Usage | None = None
    """Of the last event."""


def join_events(events: Sequence[Event]) -> list[dict[str, str]]:
    """The parts of an answer as the content of an assistant message, neighbouring texts joined."""
    parts: list[dict[str, str]] = []
    for event in events:
        if event.kind == "text" and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += event.text
        elif event.kind not in ("prompt", "done", "error"):
            parts.append({"type": event.kind, "text": event.text})
    return parts


class AnswerReader:
    """Turns the tokens of one answer into events. Neither special tokens nor bytes that form no character are text."""

    def __init__(self, tokenizer: RustBPETokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.encode_special
        self._special = {special(name) for name in tokenizer.get_special_tokens()}
        self._opens: dict[int, PartKind] = {special("<|python_start|>"): "python"}
        self._opens[special("<|output_start|>")] = "python_output"
        self._closes = {special("<|python_end|>"), special("<|output_end|>")}
        # A token may be a part of a character: its bytes wait in the decoder until the character is whole.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._inside: PartKind | None = None
        self._held: list[int] = []

    def read(self, token: int) -> Event | None:
        """The part of the answer that `token` completes, if any: text comes in pieces, the others come whole."""
        if token not in self._special:
            if self._inside is not None:
                self._held.append(token)
                return None
            text = self._decoder.decode(self._tokenizer.decode_bytes([token]))
            return Event("text", text) if text else None
        self._decoder.reset()
        if token in self._opens:
            self._inside, self._held = self._opens[token], []
        elif token in self._closes and self._inside is not None:
            part = Event(self._inside, self._tokenizer.decode(self._held))
            self._inside = None
            return part
        return None


class StopTexts:
    """Lets text through up to the first of the stop texts; holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.found, self._held = stops, False, ""

    def feed(self, text: str) -> str:
        """Take in new text; return what may be shown now."""
        if not self.stops or self.found:
            return "" if self.found else text
        held = self._held + text
        places = [place for stop in self.stops if (place := held.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        # The longest end of the text with which a stop text begins must wait for what follows.
        begun = max(
            (n for stop in self.stops for n in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:n])),
            default=0,
        )
        self._held = held[len(held) - begun :]
        return held[: len(held) - begun]

    def flush(self) -> str:
        """Return what was held back, when no more can come."""
        held, self._held = self._held, ""
        return held
