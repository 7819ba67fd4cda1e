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


# Of a demo's questions put right, nearly all right ones had log-probabilities above -4, garbled ones -5 to -20
# (dev/LOG.md).
ASKED_COUNTS = 0.25


def answer_logprob(pieces: Iterable[tuple[bytes, float | None]]) -> float:
    """How sure a model is of an answer, as a log-probability, from the bytes and log-probability of each of its tokens.

    An answer may begin with how it has understood a question ("You mean: ...?"). That can be said in many ways, none of
    them likely, so everything up to the last question mark counts by ASKED_COUNTS only.
    """
    asked = claimed = 0.0
    for text, logprob in pieces:
        claimed += logprob or 0.0  # None: the model did not choose it
        if text.rstrip().endswith(b"?"):
            asked, claimed = asked + claimed, 0.0
    return ASKED_COUNTS * asked + claimed


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
