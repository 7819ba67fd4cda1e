"""How likely a model found each token: log-probabilities, with the likeliest alternatives.

They are of the model's own distribution, log_softmax of its logits before temperature, penalties, bias, filters and
constraints: what OpenAI's API and vLLM report too. So they say how surprised the model was, not how lucky the draw.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its bytes, and its natural log-probability."""

    token: int
    bytes: bytes
    """May be a part of a character. A special token's are those of its name."""
    logprob: float | None
    """None: the model did not choose it. It begins the prompt, or it is a part of the calculator's answer."""
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens at its place, the likeliest first; the token itself may be among them."""


def answer_logprob(pieces: Iterable[tuple[bytes, float | None]]) -> float:
    """The log-probability of what an answer claims, from the bytes and log-probability of each of its tokens.

    What it asks it does not claim: an answer may begin with how it has understood a question ("You mean: ...?"), which
    can be said in many ways, none of them likely. So only what follows its last question counts.
    """
    total = 0.0
    for text, logprob in pieces:
        total += logprob or 0.0  # None: the model did not choose it
        if text.rstrip().endswith(b"?"):
            total = 0.0
    return total


def describe_tokens(
    logits: Tensor, tokens: Sequence[int], top: int, decode_bytes: Callable[[Sequence[int]], bytes]
) -> list[TokenLogprob]:
    """The log-probability of each of the N `tokens` by its logits (N, V), with `top` alternatives."""
    logprobs = logits.float().log_softmax(dim=-1)  # (N, V)
    own = logprobs[range(len(tokens)), list(tokens)].tolist()
    best = logprobs.topk(min(top, logprobs.size(-1)), dim=-1)
    return [
        TokenLogprob(
            token,
            decode_bytes([token]),
            value,
            tuple(TokenLogprob(t, decode_bytes([t]), v) for t, v in zip(ids, values, strict=True)),
        )
        for token, value, ids, values in zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
