"""Generation: sampling and the tool state machine, for one prompt or many at once.

`Engine.generate` streams samples of one prompt; `generate_batch` collects them; `generate_prompts` answers many
different prompts together. All three run the same loop. A row that has finished leaves the batch, so the work shrinks;
greedy rows do not depend on which other rows run beside them.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat.calculator import use_calculator
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.precision import Precision

__all__ = ["Engine", "KVCache", "Step", "Tokenizer", "sample_next_token"]

MIN_TEMPERATURE = 1e-6  # below it the likeliest token wins anyway, and dividing by it could overflow
# Rows times tokens generated together. CPU: measured on a 4-layer model, where more no longer pays (caches). Cards need
# more rows to be busy; this much keeps the cache of a 20-layer model near 3 GB in 16 bits.
BATCH_TOKENS = {"cpu": 8192, "cuda": 32768}
Step = list[tuple[int, int, int]]  # what one step added: (row, token, mask) of every row still running


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer (nanochat.tokenizer.RustBPETokenizer)."""

    def encode(self, text: str) -> Any:
        """The ids of an ordinary text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def encode_special(self, name: str) -> int:
        """The id of a special token."""

    def get_bos_token_id(self) -> int:
        """The id that starts every document."""


@torch.inference_mode()
def sample_next_token(
    logits: Tensor, rng: torch.Generator | None = None, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """One token per row of `logits` (B, V): (B, 1). Temperature 0 takes the likeliest; `top_k` None or 0 allows all."""
    if temperature < MIN_TEMPERATURE:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)  # (B, k)
    choice = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=rng)  # (B, 1)
    return choice if ids is None else ids.gather(-1, choice)


class _Row:
    """One sequence being written: what it must say next, and whether it is inside a tool call."""

    def __init__(self, index: int, limit: int) -> None:
        self.index, self.limit = index, limit
        self.forced: deque[int] = deque()
        self.expression: list[int] | None = None  # tokens since python_start
        self.token = -1
        self.count = 0
        self.done = False


class Engine:
    """Generates with a model and its tokenizer.

    Args:
        model: what to generate with.
        tokenizer: its tokenizer, for the tool's text and the special tokens.
        precision: how to compute; None: in the dtype of the model's weights.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, precision: Precision | None = None) -> None:
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        special = tokenizer.encode_special
        self.assistant_end = special("<|assistant_end|>")
        self._stop = {self.assistant_end, tokenizer.get_bos_token_id()}
        self._python_start, self._python_end = special("<|python_start|>"), special("<|python_end|>")
        self._output_start, self._output_end = special("<|output_start|>"), special("<|output_end|>")

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
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream `num_samples` continuations of one prompt, a column of tokens at a time.

        Args:
            tokens: the prompt.
            num_samples: rows; each samples its own tokens from the first one on.
            max_tokens: the most new tokens per row, forced ones included; None: up to the context length.
            temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
            top_k: sample from the k likeliest only; None or 0: from all.
            seed: of this call's random numbers.

        Returns:
            An iterator of (token_column, token_masks): a token per row, and 1 where the model chose it, 0 where it was
            forced (a tool's result). A row ends with assistant_end or bos, and then repeats assistant_end with mask 0.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context, or a setting is out of range.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        limit = self._limits([tokens], max_tokens, temperature, top_k)[0]
        rows = [_Row(i, limit) for i in range(num_samples)]
        return self._columns(self._run([tokens], rows, temperature, top_k, self._rng(seed)), num_samples)

    def generate_batch(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """`generate` collected: (sequences, masks), each with the prompt (mask 0), without the token that ended it."""
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        done = [False] * num_samples
        for column, column_masks in self.generate(tokens, num_samples, max_tokens, temperature, top_k, seed):
            for i, (token, mask) in enumerate(zip(column, column_masks, strict=True)):
                done[i] = done[i] or token in self._stop
                if not done[i]:
                    sequences[i].append(token)
                    masks[i].append(mask)
        return sequences, masks

    def generate_prompts(
        self,
        prompts: list[list[int]],
        max_tokens: int | None,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 42,
        max_batch_tokens: int | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Continue many different prompts, batched: (sequences, masks) in their order, as from `generate_batch`.

        Greedy results are those of one prompt at a time. `max_batch_tokens` bounds the memory: rows times the longest
        prompt and answer of a batch; None: what suits the device.
        """
        if max_batch_tokens is None:
            max_batch_tokens = BATCH_TOKENS.get(self.model.get_device().type, BATCH_TOKENS["cuda"])
        limits = self._limits(prompts, max_tokens, temperature, top_k)
        rng = self._rng(seed)
        sequences, masks = [list(p) for p in prompts], [[0] * len(p) for p in prompts]
        waiting = sorted((i for i in range(len(prompts)) if limits[i] > 0), key=lambda i: len(prompts[i]))
        while waiting:
            # Prompts of similar length go together: little padding. The last is the longest and decides the memory;
            # the first has the most room left in the context.
            count = 1
            while count < len(waiting):
                if (count + 1) * (len(prompts[waiting[count]]) + limits[waiting[0]]) > max_batch_tokens:
                    break
                count += 1
            batch, waiting = waiting[:count], waiting[count:]
            rows = [_Row(i, limits[i]) for i in batch]
            for step in self._run([prompts[i] for i in batch], rows, temperature, top_k, rng):
                for i, token, mask in step:
                    if token not in self._stop:
                        sequences[i].append(token)
                        masks[i].append(mask)
        return sequences, masks

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _columns(self, steps: Iterator[Step], num_rows: int) -> Iterator[tuple[list[int], list[int]]]:
        for step in steps:
            column, masks = [self.assistant_end] * num_rows, [0] * num_rows
            for i, token, mask in step:
                column[i], masks[i] = token, mask
            yield column, masks

    def _run(
        self, prompts: list[list[int]], rows: list[_Row], temperature: float, top_k: int | None, rng: torch.Generator
    ) -> Iterator[Step]:
        """Yield what each step adds, until every row is done. One prompt for all rows, or one for each."""
        if rows[0].limit == 0:
            return
        logits, cache = self._prefill(prompts, rows)
        while True:
            sampled: list[int] = sample_next_token(logits, rng, temperature, top_k)[:, 0].tolist()
            step = [(row.index, *self._accept(row, token)) for row, token in zip(rows, sampled, strict=True)]
            yield step
            finished = [i for i, row in enumerate(rows) if row.done]
            if len(finished) == len(rows):
                return
            logits, order = self._advance(cache, finished, rows)
            rows = [rows[i] for i in order]

    def _accept(self, row: _Row, sampled: int) -> tuple[int, int]:
        """The row's next (token, mask): a forced token if one waits, else the sampled one, which may call the tool."""
        row.count += 1
        if row.forced:
            row.token, mask = row.forced.popleft(), 0
        else:
            row.token, mask = sampled, 1
            row.done = sampled in self._stop
            if sampled == self._python_start:
                row.expression = []
            elif sampled == self._python_end and row.expression is not None:
                result = use_calculator(self.tokenizer.decode(row.expression))
                row.expression = None
                if result is not None:
                    row.forced.extend([self._output_start, *self.tokenizer.encode(result), self._output_end])
            elif row.expression is not None:
                row.expression.append(sampled)
        row.done = row.done or row.count >= row.limit
        return row.token, mask

    @torch.inference_mode()
    def _prefill(self, prompts: list[list[int]], rows: list[_Row]) -> tuple[Tensor, KVCache]:
        """Run the prompts; return the logits (B, V) of what follows each, and a cache with room for every answer."""
        lengths = [len(p) for p in prompts]
        longest, device = max(lengths), self.model.get_device()
        room = max(n + row.limit for n, row in zip(lengths * (len(rows) // len(prompts)), rows, strict=True))
        # Padding goes behind a prompt, where causal attention can't see it, and is overwritten by what is generated.
        idx = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (prompts, T)
        shared = len(prompts) < len(rows)
        cache = self._new_cache(len(prompts), longest if shared else room)
        with self._autocast():
            x = self.model.hidden(idx, kv_cache=cache)
            last = torch.tensor(lengths, device=device) - 1
            logits = self.model.logits_at(x[torch.arange(len(prompts), device=device), last])
        cache.set_lengths(lengths)
        if not shared:
            return logits, cache
        replicated = self._new_cache(len(rows), room)
        replicated.prefill(cache)
        return logits.expand(len(rows), -1), replicated

    @torch.inference_mode()
    def _advance(self, cache: KVCache, finished: list[int], rows: list[_Row]) -> tuple[Tensor, list[int]]:
        """Drop finished rows, feed the others their token; return the logits (B, V) and which row each one was."""
        order = cache.drop(finished) if finished else list(range(len(rows)))
        idx = torch.tensor([[rows[i].token] for i in order], device=self.model.get_device())  # (B, 1)
        with self._autocast():
            return self.model(idx, kv_cache=cache)[:, -1], order

    def _new_cache(self, batch_size: int, seq_len: int) -> KVCache:
        c, weight = self.model.config, self.model.lm_head.weight
        dtype = self.precision.cache_dtype if self.precision is not None else weight.dtype
        return KVCache(batch_size, c.n_kv_head, seq_len, c.head_dim, c.n_layer, weight.device, dtype)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.precision.autocast() if self.precision is not None else contextlib.nullcontext()

    def _rng(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.model.get_device()).manual_seed(seed)

    def _limits(
        self, prompts: list[list[int]], max_tokens: int | None, temperature: float, top_k: int | None
    ) -> list[int]:
        """Check everything that was asked; return how many tokens each prompt may get."""
        context, vocab_size = self.context_length, self.model.config.vocab_size
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {max_tokens}")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (the likeliest token) or more, got {temperature}")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {top_k}")
        for prompt in prompts:
            if not prompt:
                raise ValueError("the prompt is empty: give at least the bos token")
            if len(prompt) >= context:
                raise ValueError(
                    f"the prompt of {len(prompt)} tokens leaves no room in the model's context of {context}: shorten it"
                )
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise ValueError(f"the prompt has tokens outside the model's vocabulary of {vocab_size}")
        return [min(context - len(p), context if max_tokens is None else max_tokens) for p in prompts]
