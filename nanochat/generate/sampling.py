"""Choosing the next token from a model's logits: greedy, temperature, top-k, top-p, repetition penalty.

A sequence's next token depends on its logits, its settings and one random number, drawn from a generator of its own: so
a seed gives the same text whichever other sequences run beside it.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-6  # below it the likeliest token wins anyway, and dividing by it could overflow
BELOW_ONE = 1 - 2**-23  # times any float32 total it rounds to less than the total
NOT_FINITE = -1  # stands for a token where the logits are not numbers


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
    """The most new tokens, those of tool results included; None: as many as the context has room for."""
    seed: int = 42
    """Of the random numbers."""
    top_p: float | None = None
    """Only the likeliest that together reach this probability; None: all. Source: arXiv 1904.09751."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occurred already. Source: arXiv 1909.05858."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken, without a random number."""
        return self.temperature < MIN_TEMPERATURE


def sample(logits: Tensor, settings: Sampling, uniform: Tensor | None = None) -> Tensor:
    """Choose one token per sequence.

    Args:
        logits: (B, V) float32, after any repetition penalty.
        settings: the same for all.
        uniform: (B,) random numbers in [0, 1), one per sequence; not needed when greedy.

    Returns:
        (B,) int64; NOT_FINITE where the logits hold NaN or infinity that matters.
    """
    if settings.greedy:
        best, choice = logits.max(dim=-1)
        return choice.masked_fill_(best.sub_(best) != 0, NOT_FINITE)  # NaN less itself is NaN, and so is infinity
    if uniform is None:
        raise ValueError("sampling above temperature 0 needs a random number per sequence")
    ids = None
    all_tokens = logits.size(-1)
    top_k = min(settings.top_k or all_tokens, all_tokens)
    top_p = 1.0 if settings.top_p is None else settings.top_p
    if top_k < all_tokens or top_p < 1.0:
        # top_p needs them sorted as well: its share is filled from the likeliest down.
        logits, ids = logits.topk(top_k, dim=-1)  # (B, k), the likeliest first
    p = (logits / settings.temperature).softmax(dim=-1)
    total = _running_total(p)
    if top_p < 1.0:
        p = p.where(total - p < top_p, 0.0)  # those whose betters don't reach it yet
        total = _running_total(p)
    # The inverse of the distribution function: the first token whose running total exceeds a random share of it all.
    # Not torch.multinomial, which draws from one generator for the whole batch.
    share = uniform.clamp(max=BELOW_ONE).unsqueeze(1) * total[:, -1:]
    choice = torch.searchsorted(total, share, right=True).clamp_(max=total.size(-1) - 1)  # (B, 1)
    if ids is not None:
        choice = ids.gather(-1, choice)
    return choice[:, 0].where(total[:, -1].isfinite(), NOT_FINITE)


def _running_total(p: Tensor) -> Tensor:
    # A CUDA card has no deterministic cumsum, and torch raises where deterministic algorithms are asked for.
    if p.is_cuda and torch.are_deterministic_algorithms_enabled():
        return p.cpu().cumsum(dim=-1).to(p.device)
    return p.cumsum(dim=-1)


def penalize(logits: Tensor, seen: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Logits (B, V) in which each sequence's `seen` tokens are less likely; the given tensor stays as it is."""
    logits = logits.clone()
    for row, tokens in zip(logits, seen, strict=True):
        index = torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
        values = row[index]
        row[index] = torch.where(values > 0, values / penalty, values * penalty)
    return logits
