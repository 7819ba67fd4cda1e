"""Log-probabilities of tokens, in the shapes of OpenAI's APIs."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from nanochat.generate.logprobs import TokenLogprob

LEAST = -9999.0  # stands for minus infinity, which JSON can't write


def token_text(token: TokenLogprob) -> str:
    """A token as text; one that is a part of a character only is written as OpenAI does, `bytes:\\xe2\\x80`."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """As in `logprobs.content` of a chat's answer: one entry per token."""
    return [{**_entry(token), "top_logprobs": [_entry(other) for other in token.top]} for token in tokens]


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": _value(token), "bytes": list(token.bytes)}


def _value(token: TokenLogprob) -> float:
    return LEAST if token.logprob is None else max(LEAST, token.logprob)


class CompletionLogprobs:
    """As in `logprobs` of a text completion: a list each of tokens, values, alternatives, and places in the text.

    Args:
        special: tokens that are no text.
    """

    def __init__(self, special: frozenset[int]) -> None:
        self._special, self._offset = special, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def of(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens of the text."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            if token.token not in self._special:
                self._offset += len(self._decoder.decode(token.bytes))
        return {
            "tokens": [token_text(token) for token in tokens],
            "token_logprobs": [None if token.logprob is None else _value(token) for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


def _alternatives(token: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one; None of the first, before which there is nothing."""
    if token.logprob is None:
        return None
    return {token_text(other): _value(other) for other in (*token.top, token)}
