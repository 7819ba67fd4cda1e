"""Choosing the next token from a model's logits: greedy, temperature, min-p, top-k, top-p; and all settings of it.

A sequence's next token depends on its logits, its settings and one random number, drawn from a generator of its own: so
a seed gives the same text whichever other sequences run beside it.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rustbpe import decoding

MIN_TEMPERATURE = 1e-6  # below it the likeliest token wins anyway, and dividing by it could overflow
BELOW_ONE = 1 - 2**-23  # times any float32 total it rounds to less than the total
NOT_FINITE = -1  # stands for a token where the logits are not numbers


class ConstraintState(Protocol):
    """How far one answer has come in what its constraint allows."""

    @property
    def can_end(self) -> bool:
        """True if what was written is complete."""

    @property
    def can_go_on(self) -> bool:
        """True if more may follow."""

    def allowed(self, room: int) -> Tensor:
        """The tokens that may come next, (V,) bool: after each the answer can be completed within `room` tokens."""

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""


class Constraint(Protocol):
    """What an answer must look like (see nanochat.generate.grammar); shared by all answers that must look like it."""

    @property
    def least_tokens(self) -> int:
        """The tokens of the shortest answer that is known."""

    def start(self) -> ConstraintState:
        """The state of a new answer."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The knobs of generation, for engine, server, chat and evaluation. Checked when made.

    Raises:
        ValueError: a setting is out of range.
    """

    temperature: float = 1.0
    """0 takes the likeliest token; 1 samples from the model's distribution."""
    top_k: int | None = None
    """Only the k likeliest; None or 0: all."""
    max_tokens: int | None = None
    """The most new tokens, those of tool results included; 0: none; None: as many as the context has room for."""
    seed: int = 42
    """Of the random numbers."""
    top_p: float | None = None
    """Only the likeliest that together reach this probability; None: all. Source: arXiv 1904.09751."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occurred already. Source: arXiv 1909.05858."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest; 0: all. Source: arXiv 2407.01082."""
    frequency_penalty: float = 0.0
    """Lowers a token's logit by this much for each time it was written."""
    presence_penalty: float = 0.0
    """Lowers the logit of every token that was written, once."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit) pairs."""
    min_tokens: int = 0
    """The answer can't end before it has this many tokens."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the answer, beside the model's own; an ordinary one is its last text."""
    logprobs: int | None = None
    """Report each token's log-probability and as many of the likeliest alternatives; None: don't."""
    min_answer_p: float = 0.0
    """An answer that the model finds less likely than this (see `logprobs.answer_logprob`) is a guess: a server or a
    chat says `unsure` instead, and callers of Engine look themselves. 0: any answer is given."""
    unsure: str = ""
    """What is said instead of a guess."""
    constraint: Constraint | None = None
    """What the answer must look like. It excludes calls of the calculator, and goes before `min_tokens`."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {self.max_tokens}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be 0 (all tokens) to 1, got {self.min_p}")
        if not 0.0 <= self.min_answer_p <= 1.0:
            raise ValueError(f"min_answer_p must be 0 (any answer) to 1, got {self.min_answer_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias):
                raise ValueError(f"logit_bias takes pairs of a token and a finite number, got {token} and {bias}")
        for name in ("min_tokens", "logprobs"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken, without a random number."""
        return self.temperature < MIN_TEMPERATURE


def raw_sampling(settings: Sampling) -> decoding.Sampling:
    """How the compiled crate chooses a token by these settings."""
    temperature = 0.0 if settings.greedy else settings.temperature
    top_p = 1.0 if settings.top_p is None else settings.top_p
    return decoding.Sampling(temperature, top_p, settings.min_p, min(settings.top_k or 0, 1 << 31))


def sample(logits: Tensor, settings: Sampling, uniform: Tensor | None = None) -> Tensor:
    """Choose one token per sequence.

    Args:
        logits: (B, V) float32, after the rules of nanochat.generate.logit_rules.
        settings: the same for all.
        uniform: (B,) random numbers in [0, 1), one per sequence; not needed when greedy.

    Returns:
        (B,) int64; NOT_FINITE where the logits hold NaN or infinity that matters.
    """
    on_cpu = logits.device.type == "cpu" and logits.dtype == torch.float32
    if uniform is None and not settings.greedy:
        raise ValueError("sampling above temperature 0 needs a random number per sequence")
    if on_cpu and decoding.library() is not None:
        # What decodes several steps in one call chooses so too: one draw means the same token in both.
        logits, chosen = logits.detach().contiguous(), torch.empty(len(logits), dtype=torch.int64)
        draws = torch.zeros(len(logits)) if uniform is None else uniform.to(torch.float32).contiguous()
        addresses = draws.data_ptr(), chosen.data_ptr()
        decoding.choose(logits.data_ptr(), (len(logits), logits.size(1)), raw_sampling(settings), *addresses)
        return chosen
    if settings.greedy and on_cpu:
        # numpy's is a vector operation; torch's took 200 µs for 8 rows of 4,096, as long as the model's step.
        rows = logits.detach().numpy()
        choice = rows.argmax(axis=-1)
        best = rows[np.arange(len(rows)), choice]  # NaN, if there is one
        return torch.from_numpy(np.where(np.isfinite(best), choice, NOT_FINITE))
    if settings.greedy:
        best, choice = logits.max(dim=-1)
        return choice.masked_fill_(best.sub_(best) != 0, NOT_FINITE)  # NaN less itself is NaN, and so is infinity
    assert uniform is not None
    ids = None
    all_tokens = logits.size(-1)
    top_k = min(settings.top_k or all_tokens, all_tokens)
    top_p = 1.0 if settings.top_p is None else settings.top_p
    if top_k < all_tokens or top_p < 1.0:
        # top_p needs them sorted as well: its share is filled from the likeliest down.
        logits, ids = likeliest(logits, top_k) if on_cpu else logits.topk(top_k, dim=-1)  # (B, k), the likeliest first
    p = (logits / settings.temperature).softmax(dim=-1)
    finite = p[:, 0].isfinite()  # one NaN or infinity makes all of its row NaN, which the filters below would drop
    if settings.min_p > 0.0:
        p = p.where(p >= settings.min_p * p.amax(dim=-1, keepdim=True), 0.0)
    total = _running_total(p)
    if top_p < 1.0:
        enough = top_p * total[:, -1:] if settings.min_p > 0.0 else top_p  # a share of what min_p has left
        p = p.where(total - p < enough, 0.0)  # those whose betters don't reach it yet
        total = _running_total(p)
    # The inverse of the distribution function: the first token whose running total exceeds a random share of it all.
    # Not torch.multinomial, which draws from one generator for the whole batch.
    share = uniform.clamp(max=BELOW_ONE).unsqueeze(1) * total[:, -1:]
    choice = torch.searchsorted(total, share, right=True).clamp_(max=total.size(-1) - 1)  # (B, 1)
    if ids is not None:
        choice = ids.gather(-1, choice)
    return choice[:, 0].where(finite, NOT_FINITE)


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, the largest first, and their tokens, (B, k) both; as `topk`, on a CPU.

    Of equal ones the lower token comes first.
    """
    rows = logits.detach().numpy()  # (B, V)
    # torch's topk took 0.93 ms for 8 rows of 4,096. With nearly all tokens it is as good; NaN counts as largest there.
    if 4 * k > rows.shape[1] or np.isnan(rows).any():
        return logits.topk(k, dim=-1)
    bounds = np.partition(rows, -k, axis=-1)[:, -k]  # the last one that belongs to them
    ids = np.empty((len(rows), k), dtype=np.int64)
    for i, (row, bound) in enumerate(zip(rows, bounds, strict=True)):
        found = np.flatnonzero(row >= bound)
        ids[i] = found[np.argsort(-row[found], kind="stable")[:k]]
    return torch.from_numpy(np.take_along_axis(rows, ids, axis=-1)), torch.from_numpy(ids)


def _running_total(p: Tensor) -> Tensor:
    # A CUDA card has no deterministic cumsum, and torch raises where deterministic algorithms are asked for.
    if p.is_cuda and torch.are_deterministic_algorithms_enabled():
        return p.cpu().cumsum(dim=-1).to(p.device)
    return p.cumsum(dim=-1)
