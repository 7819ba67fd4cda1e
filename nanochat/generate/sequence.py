"""One sequence that is being written, and what its tokens mean: the end, and calls of the calculator.

Shapes: V vocabulary.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from nanochat.generate.calculator import use_calculator
from nanochat.generate.logit_rules import LogitRules
from nanochat.generate.logprobs import TokenLogprob
from nanochat.generate.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]
NewTokens = list[tuple[int, int]]  # (token, mask): 1 where the model chose it, 0 where it was forced


class Tokenizer(Protocol):
    """The part of a tokenizer that generation uses (nanochat.tokenizer.RustBPETokenizer)."""

    def encode(self, text: str) -> Any:
        """The ids of an ordinary text."""

    def decode(self, ids: Any) -> str:
        """The text of ids."""

    def encode_special(self, name: str) -> int:
        """The id of a special token."""

    def get_bos_token_id(self) -> int:
        """The id that starts every document."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids."""


class RowState:
    """A sequence that is being written.

    Args:
        tokens: the prompt.
        limit: the most new tokens.
        sampling: how they are chosen; its seed and limit don't count here.
        seed: of this sequence's random numbers.
        keep: None: the sequence ends when the context is full. Otherwise it then forgets the older half of it, except
            this many tokens at the start.
        prompt_logprobs: find out the log-probabilities of the prompt too, which must then be read as a whole.
    """

    def __init__(
        self,
        tokens: list[int],
        limit: int,
        sampling: Sampling,
        seed: int | str,
        keep: int | None = None,
        prompt_logprobs: bool = False,
    ) -> None:
        self.context = list(tokens)  # what the model sees, the new tokens included
        self.limit, self.keep = limit, keep
        # A generator of its own: with a shared one, what a sequence draws would depend on how many others draw beside
        # it, and a request with a seed would be answered differently on a busy server.
        self.random = random.Random(seed)
        self._drawn: list[float] = []  # from it, and not used yet
        # What sequences must have in common to be sampled in one call; all else is each one's own.
        self.sampling = _common_settings(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        self.rules = LogitRules.needed(sampling, tokens)
        self.stop_tokens = frozenset(sampling.stop_tokens)
        self.by_step = False  # somebody must see each token before the next one is made
        self.top_logprobs = sampling.logprobs  # None: none are wanted
        self.logprobs: list[TokenLogprob] = []  # of the new tokens
        self.prompt_tokens = len(tokens)
        self.prompt_logprobs: list[TokenLogprob] | None = [] if prompt_logprobs else None
        self.count = 0  # new tokens
        self.reused: int | None = None  # prompt tokens found in the cache; None: nothing was read yet
        self.expression: list[int] | None = None  # tokens since python_start; None: outside
        # One without room for an answer has ended, unless its prompt must be read.
        self.finish_reason: FinishReason | None = "length" if limit <= 0 and not prompt_logprobs else None
        self.error: Exception | None = None

    def draws(self, count: int) -> list[float]:
        """The next random numbers in [0, 1), of which `spend` says how many were used; a greedy sequence has none."""
        if self.sampling.greedy:
            return [0.0] * count
        self._drawn += [self.random.random() for _ in range(count - len(self._drawn))]
        return self._drawn[:count]

    def spend(self, count: int) -> None:
        """Drop the first random numbers that `draws` gave."""
        del self._drawn[:count]


@functools.lru_cache(maxsize=256)
def _common_settings(temperature: float, top_k: int | None, top_p: float | None, min_p: float) -> Sampling:
    """One object for equal settings: to compare all their fields for every token would cost more than to sample it."""
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)


class ToolMachine:
    """Takes in what was sampled: watches for the end, and answers what stands between python_start and python_end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.encode_special
        # bos ends an answer too: a model that begins another document has nothing more to say in this one.
        self.stop_tokens = {special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
        self._python_start, self._python_end = special("<|python_start|>"), special("<|python_end|>")
        self.watched = self.stop_tokens | {self._python_end}  # after these the next token may not be the model's
        self._output_start, self._output_end = special("<|output_start|>"), special("<|output_end|>")

    def accept(self, row: RowState, token: int) -> NewTokens:
        """The sequence's new (token, mask): the sampled one, mask 1, then what it forces, mask 0."""
        if row.count >= row.limit:  # only its prompt was to be read
            row.finish_reason = "length"
            return []
        new = [(token, 1)]
        if token in self.stop_tokens or token in row.stop_tokens:
            row.finish_reason = "stop"
        elif token == self._python_start:
            row.expression = []
        elif token == self._python_end and row.expression is not None:
            result = use_calculator(self.tokenizer.decode(row.expression))
            row.expression = None
            # The result is forced: the calculator's tokens are appended as if the model had said them, so that it never
            # gets to make a result up. Mask 0 tells training (RL) that they were not its choice. An expression that the
            # calculator doesn't know gets no result, and the model goes on by itself, as in nanochat.
            if result is not None:
                forced = [self._output_start, *self.tokenizer.encode(result), self._output_end]
                new += [(t, 0) for t in forced]
        elif row.expression is not None:
            row.expression.append(token)
        new = new[: row.limit - row.count]  # forced tokens count: they take room in the context like any other
        row.count += len(new)
        row.context += [t for t, _ in new]
        if row.rules is not None and row.finish_reason is None:
            row.rules.take(t for t, _ in new)
            if row.rules.is_complete(row.limit - row.count):
                row.finish_reason = "stop"
        if row.count >= row.limit and row.finish_reason is None:
            row.finish_reason = "length"
        return new


def worth_keeping(content: list[int], tokens: list[int]) -> int:
    """The tokens of a slot's content that a sequence can continue from, if they are most of it; else 0."""
    # A short common beginning (bos, a system message) is copied out of this slot instead, and the rest of it saved for
    # the conversation that may come back to it.
    common = common_beginning(content, tokens)
    return common if 2 * common > len(content) else 0


def common_beginning(a: list[int], b: list[int]) -> int:
    """The number of tokens that two lists have in common at the start."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:  # the usual case, compared in C
        return length
    return next(i for i in range(length) if a[i] != b[i])
