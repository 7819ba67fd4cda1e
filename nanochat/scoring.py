"""How likely a model finds given tokens, many rows at a time: the engine room of CORE and of multiple choice.

Rows are padded on the right, which a causal model never looks at, so every row gets the scores it would get alone.
Only the positions that matter go through lm_head: logits of a whole batch would not fit into a small card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of float32 logits held at once: 512 of a vocabulary of 65536 are 128 MiB.
LOGIT_ROWS = 512


class LanguageModel(Protocol):
    """What scoring needs of a model."""

    @property
    def max_seq_len(self) -> int:
        """Most tokens it can read at once."""

    def get_device(self) -> torch.device:
        """Where its parameters are."""

    def hidden(self, idx: Tensor) -> Tensor:
        """Last hidden states: (B, T) ids -> (B, T, C)."""

    def logits_at(self, x: Tensor) -> Tensor:
        """float32 logits of hidden states: (N, C) -> (N, V)."""


@dataclass(frozen=True)
class Span:
    """A row of tokens, of which tokens[start:end] are scored. 1 <= start < end <= len(tokens)."""

    tokens: Sequence[int]
    start: int
    end: int

    def cropped(self, max_tokens: int) -> Span:
        """The last `max_tokens` tokens; the first of them, with nothing before it, can't be scored."""
        cut = max(0, len(self.tokens) - max_tokens)
        start, end = self.start - cut, self.end - cut
        return Span(self.tokens[cut:], min(max(1, start), end - 1), end) if cut else self


@dataclass(frozen=True)
class Score:
    """What the model makes of a span."""

    mean_nats: float
    """Mean loss per scored token."""
    greedy: bool
    """Whether each scored token is the one the model finds most likely."""


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, padded size at most `max_tokens` (or one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of ids as one (B, longest) tensor, padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)


@torch.no_grad()
def score_spans(model: LanguageModel, spans: Sequence[Span]) -> list[Score]:
    """Score all spans in one batch; they must fit into the model's context."""
    device = model.get_device()
    hidden = model.hidden(pad_rows([span.tokens for span in spans], device))  # (B, T, C)
    # The token at position p is predicted from the hidden state at p-1.
    rows = torch.tensor([i for i, span in enumerate(spans) for _ in range(span.start, span.end)], device=device)
    before = torch.tensor([p - 1 for span in spans for p in range(span.start, span.end)], device=device)
    wanted = torch.tensor([t for span in spans for t in span.tokens[span.start : span.end]], device=device)  # (N,)
    selected = hidden[rows, before]  # (N, C)
    nats, hits = [], []
    for i in range(0, len(wanted), LOGIT_ROWS):
        logits, target = model.logits_at(selected[i : i + LOGIT_ROWS]), wanted[i : i + LOGIT_ROWS]  # (n, V)
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(dim=-1) == target)
    counts = [span.end - span.start for span in spans]
    per_span = zip(torch.cat(nats).cpu().split(counts), torch.cat(hits).cpu().split(counts), strict=True)
    return [Score(float(n.mean()), bool(h.all())) for n, h in per_span]


@torch.no_grad()
def next_token_logits(model: LanguageModel, prompts: Sequence[Sequence[int]], choices: Sequence[int]) -> Tensor:
    """float32 logits on the CPU of the tokens `choices` after each prompt, one batch: (prompts, choices)."""
    device = model.get_device()
    hidden = model.hidden(pad_rows(prompts, device))  # (B, T, C)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    logits = model.logits_at(hidden[torch.arange(len(prompts), device=device), last])  # (B, V)
    return logits[:, torch.tensor(choices, device=device)].float().cpu()
