"""The likelihood of given tokens under a model, many sequences at a time: what CORE and multiple choice are scored by.

Sequences are padded on the right, where a causal model never looks, so each gets the scores it would get alone.
Only the positions that matter go through lm_head: logits of a whole batch would not fit into a small card.
What the sequences of one example share at their start, such as a question with its solved examples, is computed once;
each continues from a copy of its keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.generate.kv_cache import KVCache
from nanochat.gpt import GPT

# Positions whose float32 logits are held at once: 512 of a vocabulary of 65536 are 128 MiB.
LOGIT_ROWS = 512
# A shared start shorter than this is cheaper to compute in every sequence than to keep apart.
MIN_SHARED = 8
# What a forward pass costs besides its tokens (reading the weights, starting kernels), in tokens: padding a batch by
# less than this is cheaper than one more batch.
PASS_TOKENS = 32


Record = dict[str, Any]  # a problem and its answer: "passed", and what else a log should hold


class LanguageModel(Protocol):
    """The part of a model that scoring uses."""

    @property
    def max_seq_len(self) -> int:
        """The most tokens it can read at once."""

    def get_device(self) -> torch.device:
        """The device of its parameters."""

    def hidden(self, idx: Tensor, kv_cache: Any = None) -> Tensor:
        """Last hidden states: (B, T) ids -> (B, T, C). With a cache, those of tokens that follow its content."""

    def logits_at(self, x: Tensor) -> Tensor:
        """float32 logits of hidden states: (N, C) -> (N, V)."""


@dataclass(frozen=True)
class Span:
    """A sequence of which tokens[start:end] are scored. 1 <= start < end <= len(tokens)."""

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
    """The model's judgement of a span."""

    mean_nats: float
    """Mean loss per scored token."""
    greedy: bool
    """True if each scored token is the one the model finds most likely."""


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, padded size at most `max_tokens` (or one sequence)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Sequences of ids as one (B, longest) tensor, padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)


class PrefixCache(Protocol):
    """Keys and values of shared starts."""

    def repeated(self, rows: Sequence[int], lengths: Sequence[int], room: int) -> PrefixCache:
        """A cache in which sequence i continues the first lengths[i] tokens of this one's rows[i], by up to `room`."""


def new_prefix_cache(model: LanguageModel, rows: int, n_tokens: int) -> PrefixCache:
    """An empty cache for the shared starts of a batch; models other than ours make their own."""
    if isinstance(model, GPT):
        return KVCache.for_model(model, rows, n_tokens)
    return model.new_prefix_cache(rows, n_tokens)  # type: ignore[attr-defined]


def shared_length(spans: Sequence[Span]) -> int:
    """The number of tokens at their start that an example's spans share and do not score; 0 where it does not pay."""
    if len(spans) < 2:
        return 0
    shared = min(common_prefix_length([span.tokens for span in spans]), *(span.start for span in spans))
    return shared if shared >= MIN_SHARED else 0


def common_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all sequences have in common at the start."""
    first, shortest = rows[0], min(len(row) for row in rows)
    return next((i for i in range(shortest) if any(row[i] != first[i] for row in rows)), shortest)


def batches_of_examples(examples: Sequence[Sequence[Span]], max_tokens: int, context: int) -> list[list[int]]:
    """Indices of examples in the batches for `score_groups` that cost least, longest first.

    Examples are sorted by length; dynamic programming finds where to cut, weighing padding against passes.

    Args:
        examples: the spans of each example.
        max_tokens: padded tokens computed in a batch, shared starts and tails together. Keys and values, of which every
            row has its copy, are kept of at most twice as many. A batch of one example may exceed both.
        context: tokens the model can read at once.
    """
    shared = [shared_length(spans) for spans in examples]
    # Behind its shared start, an example has as many tails as spans, each padded to the longest.
    tails = [max(len(span.tokens) for span in spans) - n for spans, n in zip(examples, shared, strict=True)]
    order = sorted(range(len(examples)), key=lambda i: (-shared[i], -tails[i], i))
    # Batches are runs of this order. cost[n] is the least that the first n examples can cost, in tokens; cut[n] is
    # where their last batch begins. Each batch that begins at `start` is tried, as long as it fits the bounds.
    cost = [0.0] + [float("inf")] * len(order)
    cut = [0] * len(cost)
    for start, first in enumerate(order):
        rows = tail = 0
        for stop, i in enumerate(order[start:], start + 1):
            rows, tail = rows + len(examples[i]), max(tail, tails[i])
            size, longest = shared[first] * (stop - start) + tail * rows, shared[first] + tail
            if stop > start + 1 and (size > max_tokens or longest * rows > 2 * max_tokens or longest > context):
                break
            total = cost[start] + size + PASS_TOKENS * (2 if shared[first] else 1)  # one pass for starts, one for tails
            if total < cost[stop]:
                cost[stop], cut[stop] = total, start
    batches, stop = [], len(order)
    while stop:  # walk the cuts back from the end
        batches.append(order[cut[stop] : stop])
        stop = cut[stop]
    return batches[::-1]


@torch.no_grad()
def score_groups(model: LanguageModel, groups: Sequence[Sequence[Span]]) -> list[Score]:
    """Score the spans of several examples in one batch, each example's shared start once.

    Args:
        model: see LanguageModel.
        groups: the spans of each example; each must fit into the model's context.

    Returns:
        The scores of all spans in order.
    """
    shared = [shared_length(group) for group in groups]
    spans = [span for group in groups for span in group]
    starts = [length for length, group in zip(shared, groups, strict=True) for _ in group]
    if not any(shared) or not _fits(model, spans, starts):
        starts = [0] * len(spans)
        hidden, before_tail = model.hidden(pad_rows([span.tokens for span in spans], model.get_device())), None
    else:
        hidden, before_tail = _hidden_of_tails(model, groups, shared, spans, starts)
    return _score_hidden(model, spans, starts, hidden, before_tail)


def _fits(model: LanguageModel, spans: Sequence[Span], starts: Sequence[int]) -> bool:
    """True if the padded tails behind the longest start stay within the context."""
    return max(starts) + max(len(span.tokens) - n for span, n in zip(spans, starts, strict=True)) <= model.max_seq_len


def _hidden_of_tails(
    model: LanguageModel,
    groups: Sequence[Sequence[Span]],
    shared: Sequence[int],
    spans: Sequence[Span],
    starts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Hidden states (rows, tail, C) behind the shared starts, and (rows, C) of the last token before each tail."""
    device = model.get_device()
    # An example that shares nothing still needs a row with a token in it; its tail then begins at 0 behind no keys.
    prefixes = [group[0].tokens[: max(1, n)] for group, n in zip(groups, shared, strict=True)]
    idx = pad_rows(prefixes, device)  # (examples, T)
    cache = new_prefix_cache(model, len(prefixes), idx.size(1))
    x = model.hidden(idx, kv_cache=cache)
    # Every span gets a copy of its example's keys and values, and its tail runs behind them.
    owner = [g for g, group in enumerate(groups) for _ in group]
    last = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
    before_tail = x[torch.arange(len(prefixes), device=device), last][torch.tensor(owner, device=device)]  # (rows, C)
    tails = pad_rows([span.tokens[n:] for span, n in zip(spans, starts, strict=True)], device)  # (rows, tail)
    return model.hidden(tails, kv_cache=cache.repeated(owner, starts, tails.size(1))), before_tail


def _score_hidden(
    model: LanguageModel, spans: Sequence[Span], starts: Sequence[int], hidden: Tensor, before_tail: Tensor | None
) -> list[Score]:
    """Scores from hidden states: hidden[i, j] is that of token starts[i] + j of span i."""
    device = model.get_device()
    # The token at position p is predicted from the hidden state at p-1, for the first of a tail that before it.
    rows = torch.tensor([i for i, span in enumerate(spans) for _ in range(span.start, span.end)], device=device)
    column = [p - 1 - n for span, n in zip(spans, starts, strict=True) for p in range(span.start, span.end)]
    columns = torch.tensor(column, device=device)
    wanted = torch.tensor([t for span in spans for t in span.tokens[span.start : span.end]], device=device)  # (N,)
    selected = hidden[rows, columns.clamp(min=0)]  # (N, C)
    if before_tail is not None:
        selected = torch.where((columns < 0).unsqueeze(1), before_tail[rows], selected)
    # lm_head in slices: the logits of all scored positions of a batch at once would be gigabytes.
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
    """float32 logits (prompts, choices) on the CPU: of the tokens `choices` after each prompt, in one batch."""
    device = model.get_device()
    hidden = model.hidden(pad_rows(prompts, device))  # (B, T, C)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    logits = model.logits_at(hidden[torch.arange(len(prompts), device=device), last])  # (B, V)
    return logits[:, torch.tensor(choices, device=device)].float().cpu()


# --- what the answers to a task amount to -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskScore:
    """The result of one task. Standard errors are those of a mean of independent problems."""

    name: str
    records: list[Record]
    """One per problem, in order: `passed`, and what else is known of it."""
    baseline: float
    """Accuracy of guessing, 0 to 1."""

    @property
    def accuracy(self) -> float:
        """The share of problems solved."""
        return sum(record["passed"] for record in self.records) / len(self.records)

    @property
    def stderr(self) -> float:
        """The standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.records))

    @property
    def centered(self) -> float:
        """0 for guessing, 1 for perfect."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    def groups(self) -> dict[str, TaskScore]:
        """The score of each group of problems, where the task divides them (a problem's "group")."""
        names = sorted({record["group"] for record in self.records if "group" in record})
        return {
            name: TaskScore(name, [record for record in self.records if record.get("group") == name], self.baseline)
            for name in names
        }

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k of a generative task, from at least k samples per problem; a problem without any failed."""
        counts = [(record["num_samples"], record["num_correct"]) for record in self.records]
        return sum(pass_at_k(n, c, k) if n else 0.0 for n, c in counts) / len(counts)

    def by_rule(self) -> dict[str, float]:
        """The share of problems solved by each other rule that the task knows (see `Task.other_verdicts`)."""
        names = {name: None for record in self.records for name in record.get("by_rule", ())}
        return {
            name: sum(r.get("by_rule", {}).get(name, False) for r in self.records) / len(self.records) for name in names
        }


def mean_centered(scores: Sequence[TaskScore]) -> tuple[float, float]:
    """CORE or ChatCORE: the mean centered accuracy of tasks, and its standard error."""
    mean = sum(score.centered for score in scores) / len(scores)
    variance = sum((score.stderr / (1 - score.baseline)) ** 2 for score in scores)
    return mean, math.sqrt(variance) / len(scores)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, given how many of more samples were.

    1 - C(n-c, k) / C(n, k). Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1.
    """
    if not 0 < k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"need 0 < k <= samples and 0 <= correct <= samples, got {k}, {num_samples}, {num_correct}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
