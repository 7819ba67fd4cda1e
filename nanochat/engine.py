"""Generation with a model for programs: one prompt or many at once, until all is written.

`Engine.generate` streams samples of one prompt; `generate_batch` collects them; `generate_prompts` answers many
different prompts together. All three run the loop of nanochat.generate.scheduler, as nanochat.serve.batch_engine does
for a server. Greedy answers do not depend on which other sequences run beside them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from nanochat.generate.fast_decode import Weights, make_decoder
from nanochat.generate.kv_cache import KVCache
from nanochat.generate.sampling import Sampling
from nanochat.generate.scheduler import Scheduler
from nanochat.generate.sequence import NewTokens, RowState, Tokenizer, ToolMachine
from nanochat.gpt import GPT
from nanochat.precision import Precision

__all__ = ["Engine", "KVCache", "check_prompt", "check_sampling"]

Samples = tuple[list[list[int]], list[list[int]]]  # (sequences, masks), prompts included

# Sequences times tokens generated together. CPU: measured on a 4-layer model, where more no longer pays (caches). Cards
# need more sequences to be busy; this much keeps the cache of a 20-layer model near 3 GB in 16 bits.
BATCH_TOKENS = {"cpu": 8192, "cuda": 32768}


class Engine:
    """Generates with a model and its tokenizer.

    Args:
        model: what to generate with; it may be trained between two calls.
        tokenizer: its tokenizer, for the tool's text and the special tokens.
        precision: how to compute; None: in the dtype of the model's weights.
        weights: what the weights are read as while decoding (see nanochat.generate.fast_decode).
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, precision: Precision | None = None, weights: Weights = "auto"
    ) -> None:
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        self.assistant_end = tokenizer.encode_special("<|assistant_end|>")
        self._stop = ToolMachine(tokenizer).stop_tokens
        # One token per sequence has a faster way than the model's own forward pass, with the same logits. None: not
        # with this model's switches (windows, a LoRA); it then runs itself.
        self._decoder = make_decoder(model, precision, weights)

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have, prompt and answer together."""
        return self.model.config.sequence_len

    def generate(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        **more: Any,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream `num_samples` continuations of one prompt, a column of tokens at a time.

        Args:
            tokens: the prompt.
            num_samples: how many; each samples its own tokens from the first one on.
            max_tokens: the most new tokens of each, forced ones included; None: up to the context length.
            temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
            top_k: sample from the k likeliest only; None or 0: from all.
            seed: of the first sample's random numbers; sample i has `row_seed(seed, i)`.
            more: what else `nanochat.generate.sampling.Sampling` knows: top_p, constraint, and so on.

        Returns:
            An iterator of (token_column, token_masks): a token per sample, and 1 where the model chose it, 0 where it
            was forced (a tool's result). A sample ends with assistant_end or bos, and then repeats assistant_end with
            mask 0.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context, or a setting is out of range.
        """
        # No generator function, whose body would not run before the first `next`: errors are raised at the call.
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed, **more)
        return self._columns(self._rows([tokens] * num_samples, max_tokens, sampling))

    def generate_batch(
        self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, **settings: Any
    ) -> Samples:
        """`generate` collected: (sequences, masks), each with the prompt (mask 0), without the token that ended it."""
        return self._collect(self._rows([tokens] * num_samples, max_tokens, Sampling(**settings)), num_samples)

    def generate_prompts(
        self,
        prompts: list[list[int]],
        max_tokens: int | None = None,
        *,
        max_batch_tokens: int | None = None,
        keep_end: bool = False,
        seeds: Sequence[int | str] | None = None,
        **settings: Any,
    ) -> Samples:
        """Continue many different prompts, batched: (sequences, masks) in their order, as from `generate_batch`.

        Greedy unless `settings` (those of `generate`) have a temperature; greedy results are those of one prompt at a
        time. `max_batch_tokens` bounds the memory: rows times the longest prompt and answer; None: what suits the
        device. `keep_end` leaves the sampled token that ended an answer in it. `seeds` are those of the prompts, one
        each, so that a sampled answer does not depend on which others are asked for; None: by place, from one seed.
        """
        # They need no sorting by length: when a sequence ends, the next prompt takes its slot at once, so no batch
        # waits for its longest answer.
        if max_batch_tokens is None:
            max_batch_tokens = BATCH_TOKENS.get(self.model.get_device().type, BATCH_TOKENS["cuda"])
        rows = self._rows(prompts, max_tokens, Sampling(**{"temperature": 0.0, **settings}), seeds)
        longest = max((len(row.context) + row.limit for row in rows), default=1)
        return self._collect(rows, max(1, max_batch_tokens // longest), keep_end)

    def _rows(
        self,
        prompts: list[list[int]],
        max_tokens: int | None,
        sampling: Sampling,
        seeds: Sequence[int | str] | None = None,
    ) -> list[RowState]:
        """The state of each prompt's sequence: checked, with a seed of its own."""
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {max_tokens}")
        rows = []
        for i, prompt in enumerate(prompts):
            # Before the first step: an error in the middle of a batch would cost everybody's answers.
            check_prompt(self.model, prompt)
            room = self.context_length - len(prompt)
            limit = room if max_tokens is None else min(room, max_tokens)
            check_sampling(self.model, sampling, limit)
            seed = row_seed(sampling.seed, i) if seeds is None else seeds[i]
            rows.append(RowState(prompt, limit, sampling, seed))
        return rows

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _run(self, rows: list[RowState], slots: int) -> Iterator[list[tuple[int, NewTokens]]]:
        """Yield what each step adds, (index of the sequence, new tokens), until all have ended."""
        index = {id(row): i for i, row in enumerate(rows)}
        waiting = deque(row for row in rows if row.limit > 0)
        if not waiting:
            return
        # The cache is made for these sequences and freed with them: between two calls a training run has the memory for
        # itself. It needs no more positions than the longest of them can get.
        seq_len = max(len(row.context) + row.limit for row in waiting)
        # Weights may have been trained since the last call; what the decoder keeps of them in another form is stale.
        decode = self._decoder.refresh() if self._decoder is not None else None
        slots = min(slots, len(waiting))
        # Nobody watches token by token here, so a whole prompt is read at once: a chunk is as long as a slot.
        scheduler = Scheduler(self.model, self.tokenizer, self.precision, slots, seq_len, seq_len, decode)
        while waiting or scheduler.rows:
            while waiting and scheduler.free:
                scheduler.add(waiting.popleft())
            step = scheduler.step()
            for row, _ in step:
                if row.error is not None:
                    raise row.error  # a server ends one answer with it; a program wants to know
            yield [(index[id(row)], new) for row, new in step]

    def _columns(self, rows: list[RowState]) -> Iterator[tuple[list[int], list[int]]]:
        """Line the sequences up: a column of one token each."""
        # A tool's result comes all at once, several tokens in one step. They wait here for the columns they belong to,
        # and the other sequences go on: a column is complete when every one that still runs has a token for it.
        waiting: list[deque[tuple[int, int]]] = [deque() for _ in rows]
        for step in self._run(rows, len(rows)):
            for i, new in step:
                waiting[i].extend(new)
            running = [w for w, row in zip(waiting, rows, strict=True) if row.finish_reason is None]
            while any(waiting) and all(running):
                # Those that have ended repeat assistant_end, so that every column has all samples, as in nanochat.
                pairs = [w.popleft() if w else (self.assistant_end, 0) for w in waiting]
                yield [token for token, _ in pairs], [mask for _, mask in pairs]

    def _collect(self, rows: list[RowState], slots: int, keep_end: bool = False) -> Samples:
        sequences = [list(row.context) for row in rows]
        masks = [[0] * len(row.context) for row in rows]
        for step in self._run(rows, slots):
            for i, new in step:
                for token, mask in new:
                    # A forced token that looks like an end is a part of a tool's result and stays.
                    if mask == 0 or keep_end or token not in self._stop:
                        sequences[i].append(token)
                        masks[i].append(mask)
        return sequences, masks


def row_seed(seed: int | str, row: int) -> int | str:
    """The seed of sequence `row` of a call, or of answer `row` to a problem that has this seed."""
    # Each needs its own, or all samples of a prompt would be the same. The first one's is the call's, so that it says
    # the same alone and as the first of many. A text, not seed + row: that would be the next call's seed.
    return seed if row == 0 else f"{seed}:{row}"


def check_prompt(model: GPT, prompt: list[int], room: int = 1) -> None:
    """Refuse a prompt that the model can't continue by `room` tokens.

    Raises:
        ValueError: it is empty, leaves no room in the context, or has tokens the model doesn't know.
    """
    context, vocab_size = model.config.sequence_len, model.config.vocab_size
    if not prompt:
        raise ValueError("the prompt is empty: give at least the bos token")
    if len(prompt) + room > context:
        raise ValueError(
            f"the prompt of {len(prompt)} tokens leaves no room in the model's context of {context}: shorten it"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ValueError(f"the prompt has tokens outside the model's vocabulary of {vocab_size}")


def check_sampling(model: GPT, sampling: Sampling, limit: int) -> None:
    """Refuse settings that name tokens the model doesn't know, or a constraint that can't be met in `limit` tokens.

    Raises:
        ValueError: says which.
    """
    vocab_size = model.config.vocab_size
    for name, tokens in (("logit_bias", [t for t, _ in sampling.logit_bias]), ("stop_tokens", sampling.stop_tokens)):
        if any(not 0 <= token < vocab_size for token in tokens):
            raise ValueError(f"{name} has tokens outside the model's vocabulary of {vocab_size}")
    least = 0 if sampling.constraint is None else sampling.constraint.least_tokens
    if least > limit:
        raise ValueError(
            f"the shortest answer of the asked form takes {least} tokens, but there is room for {limit}: "
            "allow more tokens or shorten the prompt"
        )
