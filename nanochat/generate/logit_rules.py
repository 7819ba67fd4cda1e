"""What a sequence's settings change in its logits before a token is sampled: bias, penalties, what may not come.

In this order, as in vLLM: bias, repetition penalty, frequency and presence penalty, then what is forbidden. Temperature
and the filters (min_p, top_k, top_p) come after it, in nanochat.generate.sampling.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from nanochat.generate.sampling import Sampling


class LogitRules:
    """The rules of one sequence, and what they must remember of it.

    Args:
        sampling: the settings.
        prompt: its tokens; the repetition penalty counts them.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        self._constraint = sampling.constraint.start() if sampling.constraint is not None else None
        # Every token so far counts, also those that a sliding context has forgotten.
        self._seen = set(prompt)
        # As in OpenAI's API and vLLM these two count what was written, not the prompt.
        self._written: Counter[int] = Counter()

    @classmethod
    def needed(cls, sampling: Sampling, prompt: Iterable[int]) -> LogitRules | None:
        """The rules of a new sequence; None when its settings leave the logits as they are."""
        s = sampling
        changes = (s.logit_bias, s.frequency_penalty, s.presence_penalty, s.min_tokens, s.constraint is not None)
        return cls(s, prompt) if any(changes) or s.repetition_penalty != 1.0 else None

    def apply(self, logits: Tensor, room: int, ends: Collection[int]) -> None:
        """Change the logits (V,) of the next token in place.

        Args:
            logits: of the next token.
            room: new tokens that may still come, the next one included.
            ends: tokens that would end the sequence.
        """
        s = self._sampling
        if s.logit_bias:
            tokens, values = zip(*s.logit_bias, strict=True)
            logits[_index(tokens, logits)] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
        if s.repetition_penalty != 1.0:
            penalize(logits, self._seen, s.repetition_penalty)
        if s.frequency_penalty or s.presence_penalty:
            counts = torch.tensor(list(self._written.values()), dtype=logits.dtype, device=logits.device)
            logits[_index(self._written, logits)] -= s.frequency_penalty * counts + s.presence_penalty
        if self._constraint is not None:
            logits.masked_fill_(~self._constraint.allowed(room).to(logits.device), -float("inf"))
        elif self._written.total() < s.min_tokens:
            logits[_index(ends, logits)] = -float("inf")

    def take(self, tokens: Iterable[int]) -> None:
        """Take note of new tokens."""
        for token in tokens:
            self._seen.add(token)
            self._written[token] += 1
            if self._constraint is not None:
                self._constraint.take(token)

    def is_complete(self, room: int) -> bool:
        """True if a constraint has all it wants: nothing can follow, or nothing need follow and there is no `room`."""
        state = self._constraint
        return state is not None and state.can_end and (room <= 0 or not state.can_go_on)


def penalize(logits: Tensor, seen: Iterable[int], penalty: float) -> None:
    """Make `seen` tokens less likely, in the logits (V,) themselves. Source: arXiv 1909.05858."""
    index = _index(seen, logits)
    values = logits[index]
    logits[index] = torch.where(values > 0, values / penalty, values * penalty)


def _index(tokens: Iterable[int], logits: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
